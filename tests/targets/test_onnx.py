"""ONNX models: what the model computes, int8 on int8 kernels, sealed so that others read them."""

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import torchfuse
from torchfuse.errors import ArtifactError, InputError, UnsupportedError
from torchfuse.targets.opening import check


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = x + nn.functional.relu6(self.second(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


X = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 3, 16, 16, generator=generator) for _ in range(8)]


@pytest.fixture(scope="module")
def fp32(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return torchfuse.export(model, X, tmp_path_factory.mktemp("onnx") / "net.onnx").path


@pytest.fixture(scope="module")
def int8(model: nn.Module, data: list[Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "int8.onnx"
    return torchfuse.export(model, X, path, precision="int8", calibration=data).path


def optimized(path: Path, tmp_path: Path) -> collections.Counter[str]:
    """The operators that ONNX Runtime runs, once it has merged what it can."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    return collections.Counter(node.op_type for node in graph.node)


def test_it_computes_what_the_model_does_on_the_threads_asked_for(
    model: nn.Module, fp32: Path
) -> None:
    run = torchfuse.load(fp32, threads=1)
    torch.testing.assert_close(run(X), model(X))
    assert run.threads == 1
    assert torchfuse.measure(run, X, runs=3, warmup=1, threads=2).threads == 2
    assert run.threads == 1


def test_batch_norms_are_folded_unless_they_are_to_stay(
    model: nn.Module, fp32: Path, tmp_path: Path
) -> None:
    assert not [n for n in onnx.load(fp32).graph.node if n.op_type == "BatchNormalization"]
    artifact = torchfuse.export(model, X, tmp_path / "plain.onnx", optimize=False)
    assert artifact.batch_norms_left == 1
    torch.testing.assert_close(torchfuse.load(artifact.path)(X), model(X))


def test_int8_runs_on_int8_kernels_throughout(model: nn.Module, int8: Path, tmp_path: Path) -> None:
    found = optimized(int8, tmp_path)
    assert found["QLinearConv"] == 2
    assert not found["Conv"]
    assert not found["Add"]


def test_int8_computes_what_the_pte_of_the_same_calibration_does(
    model: nn.Module, data: list[Tensor], int8: Path
) -> None:
    quantized = torchfuse.quantize(model, X, data, recovery=()).model
    assert torchfuse.verify(quantized, torchfuse.load(int8), data, min_sqnr_db=25).passed


def test_what_quantize_returned_becomes_an_onnx_too(
    model: nn.Module, data: list[Tensor], tmp_path: Path
) -> None:
    quantized = torchfuse.quantize(model, X, data).model
    artifact = torchfuse.export(quantized, X, tmp_path / "q.onnx")
    assert artifact.precision == "int8"


def test_sizes_may_be_dynamic_without_a_maximum(model: nn.Module, tmp_path: Path) -> None:
    sizes = ({0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=4, max=64)},)
    artifact = torchfuse.export(model, X, tmp_path / "net.onnx", dynamic_shapes=sizes)
    run = torchfuse.load(artifact.path)
    for shape in ((1, 3, 4, 16), (5, 3, 64, 16)):
        torch.testing.assert_close(run(torch.ones(shape)), model(torch.ones(shape)))
    with pytest.raises(InputError, match=r"takes \(1…\)×3×\(4…64\)×16 float32; got 1×3×2×16"):
        run(torch.ones(1, 3, 2, 16))


class Nested(nn.Module):
    def forward(self, x: Tensor, *, pair: tuple[Tensor, Tensor]) -> dict[str, Any]:
        return {"sum": x + pair[0], "rest": [pair[1] * 2, x.argmax(1)]}


def test_inputs_by_name_and_nested_results_stay_as_they_are(tmp_path: Path) -> None:
    model, x = Nested().eval(), torch.randn(2, 3)
    given = {"x": x, "pair": (x + 1, x - 1)}
    artifact = torchfuse.export(model, given, tmp_path / "nested.onnx")
    torch.testing.assert_close(torchfuse.load(artifact.path)(**given), model(**given))


def test_other_readers_take_a_sealed_file(fp32: Path) -> None:
    loaded = onnx.load(fp32)
    onnx.checker.check_model(loaded, full_check=True)
    assert [entry.key for entry in loaded.metadata_props][-1] == "torchfuse"
    session = onnxruntime.InferenceSession(str(fp32), providers=["CPUExecutionProvider"])
    assert session.run(None, {session.get_inputs()[0].name: X.numpy()})[0].shape == (1, 5)


def test_nothing_in_the_file_says_where_its_model_was_written(fp32: Path) -> None:
    assert __file__.encode() not in fp32.read_bytes()


def test_every_changed_byte_is_found(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchfuse.targets.opening._first_load", lambda *_: pytest.fail("missed"))
    path, data = tmp_path / "net.onnx", fp32.read_bytes()
    for position in [*range(0, len(data), 97), *range(len(data) - 300, len(data))]:
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="damaged or of another kind"):
            check(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: bytes(len(data)),
        lambda data: np.random.default_rng(0).bytes(len(data)),
        lambda data: b"",
    ],
)
@pytest.mark.parametrize("is_sealed", [True, False])
def test_a_damaged_file_is_an_error(
    fp32: Path, damage: Callable[[bytes], bytes], is_sealed: bool, tmp_path: Path
) -> None:
    path, data = tmp_path / "net.onnx", fp32.read_bytes()
    if not is_sealed:
        bare = onnx.load(fp32)
        del bare.metadata_props[:]
        data = bare.SerializeToString()
    path.write_bytes(damage(data))
    with pytest.raises(ArtifactError, match="damaged or of another kind"):
        torchfuse.load(path)


def test_a_whole_file_of_someone_else_is_accepted(fp32: Path, tmp_path: Path) -> None:
    bare = onnx.load(fp32)
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / "theirs.onnx")
    run = torchfuse.load(tmp_path / "theirs.onnx")
    assert run(X).shape == (1, 5)
    assert run.largest_ones().args[0].shape == X.shape


class Flips(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i1e(x)


def test_an_operator_that_onnx_has_not_is_named_with_a_target_that_has(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"no form of prims\.bessel_i1e; '\.pt' has all"):
        torchfuse.export(Flips().eval(), torch.randn(2, 3), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


class ReturnsNothingToo(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + 1, None


def test_a_result_that_is_no_tensor_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"returns tensors only, and output 1 .* is None"):
        torchfuse.export(ReturnsNothingToo().eval(), torch.ones(2), tmp_path / "m.onnx")


class FromOne(nn.Module):
    """What torch.onnx.export cannot have: a float minus a tensor of integers (pytorch#194381)."""

    def forward(self, mask: Tensor) -> Tensor:
        return (1.0 - mask) * -10000.0


def test_a_number_minus_integers_is_exported(tmp_path: Path) -> None:
    mask = torch.tensor([[1, 1, 0]])
    artifact = torchfuse.export(FromOne().eval(), mask, tmp_path / "mask.onnx")
    assert torch.equal(torchfuse.load(artifact.path)(mask), FromOne()(mask))
