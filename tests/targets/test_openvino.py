"""OpenVINO models: in the precision that they say, sealed in two files, whole or refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import openvino
import pytest
import torch
from torch import Tensor, nn

import torchfuse
from torchfuse.errors import ArtifactError, InputError, UnsupportedError
from torchfuse.targets.opening import check


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.norm(self.conv(x))) * scale
        x = x + nn.functional.relu6(self.second(x))
        return {"scores": self.head(x.mean((2, 3)))}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def given(batch: int = 1, size: int = 16, seed: int = 0) -> dict[str, Tensor]:
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "scale": torch.tensor(1.5)}


@pytest.fixture(scope="module")
def fp32(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return torchfuse.export(model, given(), tmp_path_factory.mktemp("ov") / "net.xml").path


def test_fp32_is_computed_in_fp32_though_the_cpu_may_have_bf16(
    model: nn.Module, tmp_path: Path
) -> None:
    artifact = torchfuse.export(model, given(), tmp_path / "net.xml")
    assert artifact.computes_in == "fp32"
    assert "computes everything in fp32 on this CPU" in str(artifact)
    run = torchfuse.load(artifact.path, threads=1)
    assert (run.precision, run.threads) == ("fp32", 1)
    torch.testing.assert_close(run(**given(seed=1)), model(**given(seed=1)))


def test_an_fp16_file_has_its_weights_in_fp16(tmp_path: Path) -> None:
    model, x = nn.Linear(64, 256).eval(), torch.randn(1, 64)
    plain = torchfuse.export(model, x, tmp_path / "plain.xml")
    try:
        half = torchfuse.export(model, x, tmp_path / "half.xml", precision="fp16")
    except UnsupportedError as error:  # a CPU that does not compute in it
        pytest.skip(str(error))
    with_bias = 64 * 256 + 256
    assert plain.size_bytes - half.size_bytes == pytest.approx(2 * with_bias, abs=1024)


def test_batch_norms_stay_in_the_file_where_they_are_to(model: nn.Module, tmp_path: Path) -> None:
    folded = torchfuse.export(model, given(), tmp_path / "folded.xml")
    plain = torchfuse.export(model, given(), tmp_path / "plain.xml", optimize=False)
    assert b"BatchNorm" not in folded.path.read_bytes()
    assert b"BatchNorm" in plain.path.read_bytes()


def test_int8_is_nncfs_or_that_of_quantize(model: nn.Module, tmp_path: Path) -> None:
    data = [given(seed=seed) for seed in range(8)]
    plain = torchfuse.export(model, given(), tmp_path / "i.xml", precision="int8", calibration=data)
    ours = torchfuse.export(
        torchfuse.quantize(model, given(), data).model, given(), tmp_path / "q.xml"
    )
    for artifact in (plain, ours):
        assert artifact.precision == "int8"
        run = torchfuse.load(artifact.path)
        assert torchfuse.verify(model, run, data, min_sqnr_db=20).passed
        compiled = openvino.Core().compile_model(artifact.path, "CPU")
        kinds = {
            str(op.get_rt_info()["runtimePrecision"].astype(str))
            for op in compiled.get_runtime_model().get_ordered_ops()
            if str(op.get_rt_info()["layerType"].astype(str)) == "Convolution"
        }
        assert kinds <= {"u8", "i8"}


class Attention(nn.Module):
    """By torch's own function, or spelled out."""

    def __init__(self, *, is_spelled_out: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_parts, self.is_spelled_out = nn.Linear(32, 96), is_spelled_out

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_parts(x).chunk(3, -1)
        if self.is_spelled_out:
            return torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("net", "shape", "kind"),
    [
        (Attention(is_spelled_out=True), (1, 6, 32), nncf.ModelType.TRANSFORMER),
        (Attention(is_spelled_out=False), (1, 6, 32), nncf.ModelType.TRANSFORMER),
        (nn.Sequential(nn.Linear(8, 4), nn.Softmax(-1)), (1, 8), None),
    ],
)
def test_nncf_is_told_of_an_attention(
    net: nn.Module,
    shape: tuple[int, ...],
    kind: nncf.ModelType | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, quantize = [], nncf.quantize

    def listening(*args: Any, **options: Any) -> Any:
        told.append(options["model_type"])
        return quantize(*args, **options)

    monkeypatch.setattr(nncf, "quantize", listening)
    data = list(torch.randn(8, *shape, generator=torch.Generator().manual_seed(0)))
    torchfuse.export(net.eval(), data[0], tmp_path / "n.xml", precision="int8", calibration=data)
    assert told == [kind]


def test_sizes_may_be_dynamic(model: nn.Module, tmp_path: Path) -> None:
    dim = torch.export.Dim
    sizes = {
        "x": {0: dim("n"), 2: dim("h", min=4, max=64), 3: dim("w", min=4, max=64)},
        "scale": None,
    }
    path = torchfuse.export(model, given(2), tmp_path / "net.xml", dynamic_shapes=sizes).path
    run = torchfuse.load(path)
    for batch, size in ((1, 4), (5, 64)):
        torch.testing.assert_close(run(**given(batch, size)), model(**given(batch, size)))
    with pytest.raises(InputError, match=r"takes \(1…\)×3×\(4…64\)×\(4…64\) float32, a scalar"):
        run(**given(1, 65))


def test_openvinos_own_reader_takes_a_sealed_file(fp32: Path, model: nn.Module) -> None:
    compiled = openvino.Core().compile_model(fp32, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (output,) = compiled([value.numpy() for value in given().values()]).values()
    torch.testing.assert_close(torch.from_numpy(output), model(**given())["scores"])


def test_every_changed_byte_of_either_file_is_found(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchfuse.targets.opening._first_load", lambda *_: pytest.fail("missed"))
    files = {s: fp32.with_suffix(s).read_bytes() for s in (".xml", ".bin")}
    for suffix, data in files.items():
        for other, whole in files.items():
            (tmp_path / f"net{other}").write_bytes(whole)
        for position in [*range(0, len(data), 97), *range(max(len(data) - 200, 0), len(data))]:
            damaged = bytearray(data)
            damaged[position] ^= 0x10
            (tmp_path / f"net{suffix}").write_bytes(damaged)
            with pytest.raises(ArtifactError, match="damaged or of another kind"):
                check(tmp_path / "net.xml")


def test_weights_that_are_missing_are_named(fp32: Path, tmp_path: Path) -> None:
    (tmp_path / "net.xml").write_bytes(fp32.read_bytes())
    with pytest.raises(ArtifactError, match=r"Expected 'net\.bin' beside '.*net\.xml', which is"):
        torchfuse.load(tmp_path / "net.xml")


@pytest.mark.parametrize("suffix", [".xml", ".bin"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: bytes(len(data)), lambda data: b""]
)
@pytest.mark.parametrize("is_sealed", [True, False])
def test_a_damaged_file_is_an_error(
    fp32: Path,
    suffix: str,
    damage: Callable[[bytes], bytes],
    is_sealed: bool,
    tmp_path: Path,
) -> None:
    files = {s: fp32.with_suffix(s).read_bytes() for s in (".xml", ".bin")}
    if not is_sealed:
        files[".xml"] = files[".xml"][: files[".xml"].index(b"<!-- torchfuse")]
    files[suffix] = damage(files[suffix])
    for name, data in files.items():
        (tmp_path / f"net{name}").write_bytes(data)
    if not is_sealed and suffix == ".bin" and len(files[suffix]) > 2000:
        return  # zeros are weights too, which only a checksum tells from others
    with pytest.raises(ArtifactError, match="damaged or of another kind"):
        torchfuse.load(tmp_path / "net.xml")


def test_a_whole_file_of_someone_else_is_accepted(fp32: Path, tmp_path: Path) -> None:
    bare = fp32.read_bytes()
    (tmp_path / "theirs.xml").write_bytes(bare[: bare.index(b"<!-- torchfuse")])
    (tmp_path / "theirs.bin").write_bytes(fp32.with_suffix(".bin").read_bytes())
    assert torchfuse.load(tmp_path / "theirs.xml")(*given().values()).shape == (1, 5)
