"""AOTInductor packages: machine code for one kind of CPU and one torch, and no other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchfuse
from torchfuse.errors import ArtifactError, InputError, UnsupportedError
from torchfuse.targets import TARGETS, aotinductor, target_for
from torchfuse.targets.aotinductor.cpu import this_cpu, what_lacks
from torchfuse.targets.opening import check
from torchfuse.targets.sealing import seal_zip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 7, padding=3, groups=8)  # XNNPACK's form of it is a sum
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depthwise(torch.relu(self.conv(x))).mean((2, 3)))


X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def fp32(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aoti") / "net.aoti.pt2"
    sizes = ({0: torch.export.Dim("n", min=1, max=8)},)
    return torchfuse.export(model, X, path, dynamic_shapes=sizes).path


def test_it_computes_what_the_model_does_at_every_declared_size(
    model: nn.Module, fp32: Path
) -> None:
    run = torchfuse.load(fp32, threads=1)
    assert run.threads == torch.get_num_threads() == 1
    for batch in (1, 5):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(run(x), model(x))
    with pytest.raises(InputError, match=r"takes \(1…8\)×3×8×8 float32; got 9×3×8×8"):
        run(torch.ones(9, 3, 8, 8))
    assert torchfuse.measure(run, X, runs=3, warmup=1).runs == 3


def test_int8_is_inductors_own(model: nn.Module, tmp_path: Path) -> None:
    data = [torch.randn(2, 3, 8, 8) for _ in range(8)]
    path = tmp_path / "int8.aoti.pt2"
    artifact = torchfuse.export(model, X, path, precision="int8", calibration=data)
    assert artifact.precision == "int8"
    assert torchfuse.verify(model, torchfuse.load(path), data, min_sqnr_db=20).passed


def with_metadata(path: Path, tmp_path: Path, **changed: Any) -> Path:
    """The file at `path` with other metadata, sealed."""
    file = check(path)
    assert file.metadata is not None
    bare = file.data[: file.data.index(b"torchfuse-seal-1")]
    archive = bare[:-2] + b"\0\0"
    made = tmp_path / "other.aoti.pt2"
    made.write_bytes(seal_zip(archive, {**file.metadata, **changed}))
    return made


def test_a_file_for_another_cpu_or_torch_is_refused_before_its_code_is_loaded(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "torchfuse.targets.aotinductor.package.package", lambda _: pytest.fail("loaded")
    )
    cpu = {**this_cpu(), "name": "A CPU of 2030", "instructions": ["avx2048"]}
    with pytest.raises(
        ArtifactError, match=r"compiled for A CPU of 2030 with avx2048, which .* has"
    ):
        torchfuse.load(with_metadata(fp32, tmp_path, cpu=cpu))
    with pytest.raises(ArtifactError, match=r"made with torch 2\.12\.0, and this is 2\.13"):
        torchfuse.load(with_metadata(fp32, tmp_path, torch="2.12.0"))


@pytest.mark.parametrize(
    ("made_for", "lacking"),
    [
        ({"machine": "aarch64"}, "it was compiled for aarch64, and this is x86_64"),
        ({"machine": "x86_64", "instructions": None}, None),
        ({"machine": "x86_64", "instructions": ["avx2"]}, None),
        ({}, None),
        (
            {"machine": "x86_64", "instructions": ["avx2", "amx_int8"], "name": "B"},
            "it was compiled for B with amx_int8, which A has not",
        ),
    ],
)
def test_what_another_cpu_lacks_is_said(made_for: Mapping[str, Any], lacking: str | None) -> None:
    here = {"machine": "x86_64", "name": "A", "instructions": ["avx2", "fma"]}
    assert what_lacks(here, made_for) == lacking


@pytest.mark.parametrize("position", [0, 1000, -40, -1])
def test_a_damaged_file_is_an_error(fp32: Path, position: int, tmp_path: Path) -> None:
    data = bytearray(fp32.read_bytes())
    data[position] ^= 0x10
    path = tmp_path / "net.aoti.pt2"
    for damaged in (bytes(data), bytes(data[: len(data) // 2]), b"", bytes(100)):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="damaged or of another kind"):
            torchfuse.load(path)


def test_an_exported_program_is_no_package(model: nn.Module, tmp_path: Path) -> None:
    torch.export.save(torch.export.export(model, (X,)), tmp_path / "net.pt2")
    (tmp_path / "net.pt2").rename(tmp_path / "net.aoti.pt2")
    with pytest.raises(ArtifactError, match="holds no compiled model; an exported program is none"):
        torchfuse.load(tmp_path / "net.aoti.pt2")


def test_that_there_is_no_compiler_is_said_before_any_work(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UnsupportedError, match=r"'no-such-compiler' is not to be found; install"):
        torchfuse.export(model, X, tmp_path / "net.aoti.pt2")


def test_only_an_aoti_pt2_is_one(tmp_path: Path) -> None:
    assert any(isinstance(target, aotinductor.AotInductor) for target in TARGETS)
    with pytest.raises(ArtifactError, match=r"got 'net\.pt2' with suffix '\.pt2'"):
        target_for("net.pt2")
