"""`torchfuse fuse MODEL -o OUT`: what is written, and that nothing is when it fails."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import torchfuse
from torchfuse import model_source
from torchfuse.cli import cli
from torchfuse.errors import ArtifactError, InputError, UnsupportedError

NETS = """
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    model[1].running_mean.normal_()
    return model, torch.ones(1, 3, 10, 10)


class Branch(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def branch():
    return Branch(), torch.ones(1, 3)
"""
IMAGE = torch.randn(1, 3, 10, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def nets(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(NETS)
    return str(tmp_path / "nets.py")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["fuse", *map(str, arguments)])


def reference(nets: str) -> nn.Module:
    model = model_source.load(f"{nets}:net").model
    assert isinstance(model, nn.Module)
    return model


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * a.abs().max())


def test_an_exported_program_computes_what_the_model_did(nets: str, tmp_path: Path) -> None:
    out = tmp_path / "net.pt2"
    result = run(f"{nets}:net", "-o", out)
    assert result.exit_code == 0, result.output
    assert f"Wrote {out} ({out.stat().st_size:,} bytes)" in result.stdout
    program = torch.export.load(out)
    assert "batch_norm" not in str(program.graph)
    assert close(reference(nets)(IMAGE), program.module()(IMAGE))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_state_dict_loads_into_a_fused_model(nets: str, tmp_path: Path, suffix: str) -> None:
    if suffix == ".safetensors":
        load_file = pytest.importorskip("safetensors.torch").load_file
    else:

        def load_file(path: Path) -> dict[str, Tensor]:
            return torch.load(path, weights_only=True)

    out = tmp_path / f"net{suffix}"
    result = run(f"{nets}:net", "-o", out)
    assert result.exit_code == 0, result.output
    assert "These are weights, for the model that torchfuse.fuse returns to load" in result.stdout
    model = reference(nets)
    fused = torchfuse.fuse(model, IMAGE).model
    fused.load_state_dict(load_file(out))
    assert close(model(IMAGE), fused(IMAGE))


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
def test_an_exported_program_is_fused_too(nets: str, tmp_path: Path) -> None:
    model = reference(nets)
    torch.export.save(torch.export.export(model, (IMAGE,)), tmp_path / "net.pt2")
    out = tmp_path / "fused.pt2"
    result = run(tmp_path / "net.pt2", "-o", out)
    assert result.exit_code == 0, result.output
    program = torch.export.load(out)
    assert "batch_norm" not in str(program.graph)
    assert close(model(IMAGE), program.module()(IMAGE))


def test_weights_are_loaded_before_fusing(nets: str, tmp_path: Path) -> None:
    state = {name: value * 2 for name, value in reference(nets).state_dict().items()}
    torch.save(state, tmp_path / "trained.pt")
    out = tmp_path / "net.pt2"
    result = run(f"{nets}:net", "--weights", tmp_path / "trained.pt", "-o", out)
    assert result.exit_code == 0, result.output
    model = reference(nets)
    model.load_state_dict(state)
    assert close(model(IMAGE), torch.export.load(out).module()(IMAGE))


@pytest.mark.parametrize(
    ("model", "out", "kind", "complaint"),
    [
        ("net", "net.onnx", InputError, r"net\.onnx' has no suffix that says what to write"),
        ("net", "missing/net.pt", ArtifactError, "folder .*missing' does not exist"),
        ("branch", "net.pt2", UnsupportedError, "torch.export cannot take this model"),
    ],
)
def test_when_it_fails_nothing_is_written(
    nets: str, tmp_path: Path, model: str, out: str, kind: type[Exception], complaint: str
) -> None:
    before = sorted(tmp_path.iterdir())
    result = run(f"{nets}:{model}", "-o", tmp_path / out)
    assert isinstance(result.exception, kind), result.output
    with pytest.raises(kind, match=complaint):
        raise result.exception
    assert sorted(path for path in tmp_path.iterdir() if path.name != "__pycache__") == before


def test_an_old_file_survives_a_failure(nets: str, tmp_path: Path) -> None:
    out = tmp_path / "net.pt2"
    out.write_bytes(b"old")
    assert run(f"{nets}:branch", "-o", out).exit_code != 0
    assert out.read_bytes() == b"old"
