"""A file is written once it was run and compared; what cannot be is an error, and no file."""

import hashlib
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import DeQuantStub, QuantStub

import torchfuse
from torchfuse.cases import Case
from torchfuse.delegation import DelegationWarning
from torchfuse.errors import (
    ArtifactError,
    CalibrationError,
    ExportWarning,
    InputError,
    TorchfuseError,
    UnsupportedError,
)
from torchfuse.exporting import model_files as exporting
from torchfuse.quantizing import static
from torchfuse.targets.opening import check
from torchfuse.targets.target import Made


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.bn.running_mean.copy_(image(8, seed=1))
            self.bn.running_var.copy_(image(8, seed=2).abs() + 0.5)
            self.bn.weight.copy_(image(8, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        return self.head(nn.functional.adaptive_avg_pool2d(y, 1).flatten(1))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture
def x() -> Tensor:
    return image(1, 3, 16, 16)


@pytest.mark.parametrize("name", ["model.pte", "model.pt", "model.ptl"])
def test_a_file_is_what_the_artifact_says_and_computes_what_the_model_does(
    model: nn.Module, x: Tensor, tmp_path: Path, name: str
) -> None:
    artifact = torchfuse.export(model, x, tmp_path / name)
    data = (tmp_path / name).read_bytes()
    assert artifact.path == tmp_path / name
    assert f".{artifact.format}" == artifact.path.suffix
    assert artifact.precision == "fp32"
    assert artifact.size_bytes == len(data)
    assert artifact.sha256 == hashlib.sha256(data).hexdigest()
    assert artifact.equivalence is not None
    assert artifact.equivalence.passed
    other = image(1, 3, 16, 16, seed=7)
    torch.testing.assert_close(torchfuse.load(artifact.path)(other), model(other))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_int8_is_near_the_model_and_much_smaller_in_its_weights(x: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    calibration = [image(2, 3, 16, 16, seed=seed) for seed in range(4)]
    whole = torchfuse.export(model, x, tmp_path / "fp32.pte")
    small = torchfuse.export(
        model, x, tmp_path / "int8.pte", precision="int8", calibration=calibration
    )
    assert small.precision == "int8"
    assert small.equivalence is not None
    assert small.equivalence.verdict.startswith("within the bound: SQNR ")
    assert "equivalent" not in str(small)
    assert small.size_bytes < whole.size_bytes / 3
    assert small.equivalence is not None
    assert small.equivalence.sqnr_db is not None
    assert small.equivalence.sqnr_db > 25
    assert small.delegation is not None
    assert small.delegation.calls_left == 0


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.ConvTranspose2d(3, 4, 2, 2), nn.BatchNorm2d(4)
        self.first, self.alone = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        with torch.no_grad():
            self.norm.running_mean.copy_(image(4, seed=1))
            self.alone.running_mean.copy_(image(4, seed=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.alone(torch.relu(self.first(self.norm(self.up(x)))))


@pytest.mark.parametrize("suffix", ["pt", "ptl"])
def test_what_torchs_optimizer_leaves_is_fused_and_what_is_left_is_counted(
    tmp_path: Path, suffix: str
) -> None:
    torch.manual_seed(0)
    model, x = Transposed().eval(), image(1, 3, 4, 4)
    fused = torchfuse.export(model, x, tmp_path / f"fused.{suffix}")
    assert (fused.batch_norms, fused.batch_norms_left) == (2, 1)  # the other follows a ReLU
    assert "batch norms: 2 in the model, 1 in the file" in str(fused)
    torch.testing.assert_close(torchfuse.load(fused.path)(x), model(x))
    plain = torchfuse.export(model, x, tmp_path / f"plain.{suffix}", optimize=False)
    assert (plain.batch_norms, plain.batch_norms_left) == (2, 2)
    assert torchfuse.export(model, x, tmp_path / "m.pte").batch_norms is None


def test_a_batch_norm_that_cannot_be_fused_stays_and_nothing_is_said_to_be_wrong(
    tmp_path: Path,
) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y if x.shape[0] > 1 else self.norm(y)

    artifact = torchfuse.export(Branches().eval(), image(1, 3, 4, 4), tmp_path / "m.pt")
    assert (artifact.batch_norms, artifact.batch_norms_left) == (2, 2)
    assert artifact.notes == ()


def test_int8_is_calibrated_on_a_file_as_quantize_is(x: Tensor, tmp_path: Path) -> None:
    torch.save(x, tmp_path / "x.pt")
    np.save(tmp_path / "x.npy", image(8, 3, 16, 16).numpy())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    path = tmp_path / "m.pte"
    artifact = torchfuse.export(model, x, path, precision="int8", calibration=tmp_path / "x.npy")
    assert artifact.precision == "int8"
    with pytest.raises(CalibrationError, match=r"x\.pt', which is neither"):
        torchfuse.export(model, x, path, precision="int8", calibration=tmp_path / "x.pt")


def test_what_quantize_returns_is_exported_as_int8(
    model: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    quantized = torchfuse.quantize(model, x, image(8, 3, 16, 16)).model
    artifact = torchfuse.export(quantized, x, tmp_path / "model.pte")
    assert artifact.precision == "int8"
    run = torchfuse.load(artifact.path)
    assert torchfuse.verify(quantized, run, x, min_sqnr_db=40).passed


def test_fp16_computes_in_half_and_takes_and_returns_float32(
    model: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DelegationWarning)  # in a model this small, casts matter
        artifact = torchfuse.export(model, x, tmp_path / "model.pte", precision="fp16")
    assert artifact.precision == "fp16"
    assert artifact.delegation is not None
    assert artifact.delegation.macs_share == 1
    y = torchfuse.load(artifact.path)(x)
    assert y.dtype is torch.float32
    difference = (y - model(x)).abs().max() / model(x).abs().max()
    assert 1e-5 < difference < 1e-2  # more than float32 rounds, no more than half does
    assert next(model.parameters()).dtype is torch.float32


def test_fp16_where_the_delegate_would_leave_the_work_is_an_error(tmp_path: Path) -> None:
    model = nn.Conv3d(2, 4, 3).eval()
    with pytest.raises(UnsupportedError, match=r"does not run this model in fp16: .* 1D \+ 2D"):
        torchfuse.export(model, image(1, 2, 5, 5, 5), tmp_path / "m.pte", precision="fp16")
    assert list(tmp_path.iterdir()) == []


def test_an_example_batch_of_one_does_not_fix_a_dynamic_size(
    model: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    sizes = ({0: torch.export.Dim("n", max=8)},)
    run = torchfuse.load(torchfuse.export(model, x, tmp_path / "m.pte", dynamic_shapes=sizes).path)
    for batch in (1, 3, 8):
        y = image(batch, 3, 16, 16)
        torch.testing.assert_close(run(y), model(y))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_batch_and_spatial_sizes_can_be_dynamic_and_are_tried_below_the_bound(
    model: nn.Module, tmp_path: Path, precision: Any
) -> None:
    dim = torch.export.Dim
    sizes = ({0: dim("n", max=4), 2: dim("h", min=4, max=24), 3: dim("w", min=4, max=24)},)
    artifact = torchfuse.export(
        model,
        image(2, 3, 16, 16),
        tmp_path / "model.pte",
        precision=precision,
        calibration=image(4, 3, 16, 16) if precision == "int8" else None,
        dynamic_shapes=sizes,
    )
    assert artifact.equivalence is not None
    sizes_compared = [o for o in artifact.equivalence.outputs if not o.name.startswith("data")]
    assert len(sizes_compared) == 4  # the example, smallest, middle, largest
    run = torchfuse.load(artifact.path)
    for shape in ((1, 3, 5, 9), (3, 3, 24, 4)):
        y = image(*shape)
        assert torchfuse.verify(model, run, y, min_sqnr_db=60 if precision == "fp32" else 20).passed
    with pytest.raises(InputError, match=r"takes \(1…4\)×3×\(4…24\)×\(4…24\) float32"):
        run(image(5, 3, 8, 8))


def test_a_size_that_specializes_is_an_error_with_the_reason(tmp_path: Path) -> None:
    class Reshapes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 12) * 2

    sizes = ({0: torch.export.Dim("n", max=8)},)
    with pytest.raises(UnsupportedError, match=r"with these dynamic shapes: .*constant"):
        torchfuse.export(Reshapes().eval(), image(2, 12), tmp_path / "m.pte", dynamic_shapes=sizes)


class Halves(nn.Module):
    """Takes sizes that are a multiple of two."""

    def forward(self, x: Tensor) -> Tensor:
        half = nn.functional.max_pool2d(x, 2)
        return torch.cat([x, nn.functional.interpolate(half, scale_factor=2.0)], 1)


@pytest.mark.filterwarnings("ignore::torchfuse.DelegationWarning")
def test_sizes_that_are_multiples_are_tried_as_such(tmp_path: Path) -> None:
    sizes = {"x": {2: 2 * torch.export.Dim("half", min=2, max=9)}}
    artifact = torchfuse.export(
        Halves().eval(), image(1, 3, 8, 8), tmp_path / "m.pte", dynamic_shapes=sizes
    )
    assert artifact.equivalence is not None
    assert len(artifact.equivalence.outputs) == 4


def test_a_size_without_a_maximum_is_an_error(tmp_path: Path) -> None:
    sizes = ({0: torch.export.Dim("n")},)
    with pytest.raises(InputError, match="Expected a maximum for every dynamic size"):
        torchfuse.export(
            nn.Linear(3, 3).eval(), image(2, 3), tmp_path / "m.pte", dynamic_shapes=sizes
        )


def test_work_left_outside_the_delegate_is_warned_about_where_export_was_called(
    x: Tensor, tmp_path: Path
) -> None:
    class Sine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.asinh(torch.relu(x))

    with pytest.warns(DelegationWarning, match="does not run 1× asinh") as caught:
        torchfuse.export(Sine().eval(), x, tmp_path / "m.pte")
    assert caught[0].filename == __file__


class ReturnsNaN(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(-x.abs())


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("not today")


def network() -> nn.Module:
    return Network().eval()


def with_nan(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = torch.nan
    return model


def with_inf(model: nn.Module) -> nn.Module:
    model.bn.running_var[3] = torch.inf
    return model


FLOAT16 = r"^Expected a model in float32, got torch.float16 \('conv.weight'\); call model.float"
ERRORS = {
    "training mode": (
        Network,
        {},
        InputError,
        "but the model itself and 1 more module are in training mode; call model",
    ),
    "NaN": (
        lambda: ReturnsNaN().eval(),
        {},
        InputError,
        r"ReturnsNaN returns NaN or Inf \(its outp",
    ),
    "raises": (lambda: Raises().eval(), {}, InputError, "Raises cannot run on .*: not today"),
    "no calibration": (
        network,
        {"precision": "int8"},
        CalibrationError,
        "Expected calibration data, got None",
    ),
    "calibration without int8": (
        network,
        {"calibration": torch.ones(1)},
        InputError,
        "Calibration data is for int8, but the precision is None",
    ),
    "other precision": (
        lambda: network().half(),
        {"precision": "fp32"},
        InputError,
        FLOAT16,
    ),
    "half, as it is": (lambda: network().half(), {}, InputError, FLOAT16),
    "half in fp16": (lambda: network().half(), {"precision": "fp16"}, InputError, FLOAT16),
    "half in int8": (
        lambda: network().half(),
        {"precision": "int8", "calibration": torch.ones(1)},
        InputError,
        FLOAT16,
    ),
    "double": (
        lambda: nn.Sequential(nn.Flatten(), Cast(), nn.Linear(768, 2).double()).eval(),
        {},
        InputError,
        r"^Expected a model in float32, got torch.float64 \('2.weight'\); call model.float",
    ),
    "NaN in the weights": (
        lambda: with_nan(network()),
        {},
        InputError,
        "^Expected finite weights, but 'conv.weight' has NaN in 1 of its 216 values; load a check",
    ),
    "Inf in the statistics": (
        lambda: with_inf(network()),
        {"precision": "int8", "calibration": torch.ones(1)},
        InputError,
        "^Expected finite weights, but 'bn.running_var' has Inf in 1 of its 8 values; load a chec",
    ),
}


class Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


@pytest.mark.parametrize("name", ERRORS)
def test_a_model_that_cannot_be_exported_is_an_error_and_no_file(
    name: str, x: Tensor, tmp_path: Path
) -> None:
    build, options, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        torchfuse.export(build(), x, tmp_path / "model.pte", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_path_is_looked_at_before_any_work(x: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"'\.pte', .*'\.pt', '\.ptl'"):
        torchfuse.export(Raises(), x, tmp_path / "model.tflite")
    with pytest.raises(ArtifactError, match="does not exist; create it first"):
        torchfuse.export(Raises(), x, tmp_path / "none" / "model.pte")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "fp16"}, UnsupportedError, r"'\.pt' has no fp16"),
        ({"dynamic_shapes": ({},)}, InputError, "inputs of any size; leave the dynamic sizes out"),
    ],
)
def test_what_torchscript_does_not_have_is_an_error(
    model: nn.Module,
    x: Tensor,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[TorchfuseError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        torchfuse.export(model, x, tmp_path / "model.pt", **options)


def test_a_file_that_computes_something_else_is_not_written(
    model: nn.Module, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchfuse.algebra import folding

    fold = folding.fold_into_weight

    def one_percent_off(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        weight, bias = fold(*args, **options)
        return weight * 1.01, bias

    monkeypatch.setattr(folding, "fold_into_weight", one_percent_off)
    with pytest.raises(
        UnsupportedError, match=r"does not compute the same: .* Nothing was written"
    ):
        torchfuse.export(model, x, tmp_path / "model.pte")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_an_error_when_loaded(
    model: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    path = torchfuse.export(model, x, tmp_path / "model.pte").path
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="do not have the SHA-256 they were sealed with"):
        torchfuse.load(path)


def test_the_model_is_left_as_it_was(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torchfuse.export(
        model, x, tmp_path / "m.pte", precision="int8", calibration=image(4, 3, 16, 16)
    )
    assert isinstance(model.bn, nn.BatchNorm2d)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


class InPlace(nn.Module):
    """Writes to its argument and to a buffer, and takes random numbers."""

    def __init__(self, scriptable: bool = True) -> None:
        super().__init__()
        self.quantize, self.linear, self.dequantize = QuantStub(), nn.Linear(4, 4), DeQuantStub()
        self.register_buffer("calls", torch.zeros(()))
        if not scriptable:
            self.forward = self.untypable

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5)
        self.calls += 1
        return self.dequantize(self.linear(self.quantize(x))) + 0 * torch.rand(1)

    def untypable(self, x: Tensor, *rest: Any) -> Tensor:
        return InPlace.forward(self, x)


@pytest.mark.parametrize(
    ("scriptable", "int8"), [(True, False), (False, False), (True, True)], ids=str
)
def test_inputs_buffers_and_random_state_are_left_as_they_were(
    tmp_path: Path, scriptable: bool, int8: bool
) -> None:
    model, x, calibration = InPlace(scriptable).eval(), image(2, 4), image(16, 4)
    given, given_calibration = x.clone(), calibration.clone()
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExportWarning)  # that it was traced
        torchfuse.export(
            model,
            x,
            tmp_path / "m.pt",
            precision="int8" if int8 else None,
            calibration=calibration if int8 else None,
        )
    assert torch.equal(x, given)
    assert torch.equal(calibration, given_calibration)
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), state)
    loaded = torchfuse.load(tmp_path / "m.pt")
    assert loaded.calls == 0


def test_int8_is_calibrated_on_what_was_given_though_forward_writes_to_it(tmp_path: Path) -> None:
    class Shifts(InPlace):
        def forward(self, x: Tensor) -> Tensor:
            return self.dequantize(self.linear(self.quantize(x.sub_(0.5))))

    torch.manual_seed(0)
    artifact = torchfuse.export(
        Shifts().eval(),
        torch.rand(2, 4),
        tmp_path / "m.pt",
        precision="int8",
        calibration=torch.rand(64, 4),
    )
    assert artifact.equivalence is not None
    assert artifact.equivalence.sqnr_db is not None
    assert artifact.equivalence.sqnr_db > 30


@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
def test_a_program_that_would_write_to_its_inputs_or_buffers_is_an_error(
    tmp_path: Path, int8: bool
) -> None:
    model, x = InPlace().eval(), image(2, 4)
    before = x.clone()
    with pytest.raises(UnsupportedError, match=r"got one that writes to calls and x, which"):
        torchfuse.export(
            model,
            x,
            tmp_path / "m.pte",
            precision="int8" if int8 else None,
            calibration=x if int8 else None,
        )
    assert torch.equal(x, before)
    assert model.calls == 0


def test_in_place_operators_on_tensors_of_its_own_are_no_obstacle(tmp_path: Path) -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x + x
            y.add_(x)
            return y.relu_()

    artifact = torchfuse.export(Own().eval(), image(2, 4), tmp_path / "m.pte")
    assert artifact.equivalence is not None
    assert artifact.equivalence.passed


def test_the_lite_interpreter_takes_no_inputs_by_name(
    model: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=r"by position only, got x by name; .* use '\.pt'"):
        torchfuse.export(model, {"x": x}, tmp_path / "m.ptl")
    assert torchfuse.export(model, {"x": x}, tmp_path / "m.pt").format == "pt"


def test_tracing_is_said_in_a_warning_and_in_the_notes(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor, *rest: Any) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.warns(ExportWarning, match=r"'m.pt' was traced, .* is frozen as it ran") as caught:
        artifact = torchfuse.export(Branches().eval(), torch.ones(3), tmp_path / "m.pt")
    assert [warning.filename for warning in caught] == [__file__]  # torch's own is not repeated
    (note,) = artifact.notes
    assert note.startswith("traced, since scripting fails: ")


def test_a_scripted_model_has_no_notes(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    assert torchfuse.export(model, x, tmp_path / "m.pt").notes == ()


def test_int8_that_is_hardly_like_the_model_is_warned_about(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    x = image(1, 3, 8, 8)
    with pytest.warns(
        ExportWarning, match=r"quantized to \d\.\d dB only .* calibration inputs like"
    ):
        artifact = torchfuse.export(
            model, x, tmp_path / "m.pte", precision="int8", calibration=x / 1000
        )
    assert len(artifact.notes) == 1


def with_two_logits() -> tuple[nn.Module, list[Tensor]]:
    """A model for two classes, and inputs on which one logit is far from zero."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 2))
    return model.eval(), [image(1, 3, 8, 8, seed=i) * (0.2 + i % 5) for i in range(20)]


def test_a_program_that_is_a_step_off_on_one_example_is_a_good_one(tmp_path: Path) -> None:
    model, calibration = with_two_logits()
    x = image(1, 3, 8, 8, seed=102) * 0.3
    int8 = torchfuse.quantize(model, x, calibration).model
    options: dict[str, Any] = {"precision": "int8", "calibration": calibration}
    path = torchfuse.export(model, x, tmp_path / "m.pte", **options).path
    expected, quantized, got = model(x), int8(x), torchfuse.load(path)(x)
    # Closer than 3 dB to what the quantized model loses, which all of the data say, it is not.
    assert (expected - got).norm() > 1.4 * (expected - quantized).norm()


def test_int8_is_judged_on_calibration_inputs_in_the_examples_shape() -> None:
    example = Case((torch.zeros(2, 3),), {"scale": 2.0})
    data = [Case((torch.arange(21.0).reshape(7, 3),), {"scale": 3.0}), Case((torch.ones(2, 4),))]
    found = exporting.in_the_shape_of(example, data, 2)
    assert [case.args[0].tolist() for case in found] == [
        [[0, 1, 2], [3, 4, 5]],
        [[12, 13, 14], [15, 16, 17]],
    ]
    assert [case.kwargs for case in found] == [{"scale": 3.0}] * 2
    assert exporting.in_the_shape_of(example, [Case((torch.ones(2, 4),), {"scale": 1.0})], 2) == []


def test_an_int8_program_that_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clamps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 2, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.max_pool2d(self.first(x) * 20.0, 3, 1, 1)
            return self.last(nn.functional.relu6(y) + 1.0).flatten(1)

    monkeypatch.setattr(static, "_KEEPING_RANGES", set())  # XNNPACK clamps elsewhere then
    torch.manual_seed(0)
    data = [image(1, 3, 8, 8, seed=seed) for seed in range(20)]
    with pytest.raises(
        UnsupportedError, match=r"does not compute the same: output: .* SQNR .* Nothing was writ"
    ):
        torchfuse.export(
            Clamps().eval(), data[0], tmp_path / "m.pte", precision="int8", calibration=data
        )
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_all_zero_are_not_a_step_off() -> None:
    model, calibration = with_two_logits()
    int8 = torchfuse.quantize(model, calibration[0], calibration).model
    made = Made({}, "int8", {}, lambda x: 0 * int8(x), int8)
    problems, _, _ = exporting._judged(int8, made, [Case((x,)) for x in calibration[:8]])
    assert problems == [
        "output: has an SQNR of 0.0 dB against the quantized model; at least 10.0 dB was asked for."
    ]


def test_weights_in_half_precision_are_called_so(tmp_path: Path) -> None:
    model, x = nn.Linear(4, 4).half().eval(), image(2, 4).half()
    for suffix in ("pt", "pte"):
        artifact = torchfuse.export(model, x, tmp_path / f"m.{suffix}")
        assert artifact.precision == "fp16"
        torch.testing.assert_close(torchfuse.load(artifact.path)(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", ["pt", "pte"])
def test_weights_in_other_precisions_are_an_error(
    dtype: torch.dtype, suffix: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"got {dtype} \('weight'\); call model.float\(\) first"):
        torchfuse.export(
            nn.Linear(4, 4).to(dtype).eval(), image(2, 4).to(dtype), tmp_path / f"m.{suffix}"
        )


def test_a_traced_graph_that_is_not_quantized_can_be_saved_as_torchscript(
    model: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExportWarning)  # that it was traced
        path = torchfuse.export(fx.symbolic_trace(model), x, tmp_path / "m.pt").path
    torch.testing.assert_close(torchfuse.load(path)(x), model(x))


def test_what_quantize_returns_is_refused_for_torchscript(
    model: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    quantized = torchfuse.quantize(model, x, image(8, 3, 16, 16)).model
    with pytest.raises(UnsupportedError, match=r"torchfuse.quantize made is for '\.pte'"):
        torchfuse.export(quantized, x, tmp_path / "model.pt")


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Encodes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x

    def encode(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.mark.parametrize(
    ("model", "given", "options", "error", "message"),
    [
        (lambda x: x, torch.ones(2), {}, InputError, "a torch.nn.Module, got function; a function"),
        (
            Encodes(),
            Case((torch.ones(2),), method="encode"),
            {},
            InputError,
            r"Expected inputs of `forward`, .* got encode\(2\)",
        ),
        (Locked(), torch.ones(2), {"suffix": "pt"}, UnsupportedError, "Locked cannot be copied"),
        (
            nn.ReLU(),
            torch.ones(2),
            {"dynamic_shapes": 5},
            InputError,
            "Expected dynamic_shapes for each argument of forward, .* got 5 in 5",
        ),
    ],
    ids=["a function", "another method", "a lock", "no dynamic shapes"],
)
def test_what_cannot_be_exported_at_all_is_an_error_of_ours(
    model: Any, given: Any, options: dict[str, Any], error: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / f"m.{options.pop('suffix', 'pte')}"
    if isinstance(model, nn.Module):
        model.eval()
    with pytest.raises(error, match=message):
        torchfuse.export(model, given, path, **options)


def test_fp16_that_the_delegate_runs_half_of_is_an_error(tmp_path: Path) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.deep = nn.Conv2d(3, 8, 3), nn.Conv3d(1, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.deep(self.flat(x)[:, None])

    with pytest.raises(UnsupportedError, match=r"in fp16: XNNPACK does not run .*convolution"):
        torchfuse.export(Half().eval(), image(1, 3, 8, 8), tmp_path / "m.pte", precision="fp16")


def test_keys_of_a_nested_dict_may_come_in_any_order(tmp_path: Path) -> None:
    class Difference(nn.Module):
        def forward(self, pair: dict[str, Tensor], *, scale: Tensor, shift: Tensor) -> Tensor:
            return (pair["a"] - pair["b"]) * scale + shift

    a, b, scale, shift = (image(2, 3, seed=seed) for seed in range(4))
    given = Case(({"a": a, "b": b},), {"scale": scale, "shift": shift})
    run = torchfuse.load(torchfuse.export(Difference().eval(), given, tmp_path / "m.pte").path)
    expected = (a - b) * scale + shift
    torch.testing.assert_close(run({"b": b, "a": a}, shift=shift, scale=scale), expected)
    with pytest.raises(InputError, match="or other nesting"):
        run({"b": b, "c": a}, shift=shift, scale=scale)


@pytest.mark.filterwarnings("ignore::torchfuse.DelegationWarning")
def test_a_file_that_is_wrong_on_the_data_only_is_not_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Conv2d(3, 8, 3).eval(), image(1, 3, 8, 8)
    torchfuse.export(model, x, tmp_path / "small.pte", precision="fp16")
    with pytest.raises(UnsupportedError, match=r"data, output: the candidate has NaN or Inf"):
        torchfuse.export(model, x, tmp_path / "m.pte", precision="fp16", data=[x, x * 1e6])
    assert not (tmp_path / "m.pte").exists()


@pytest.mark.parametrize("suffix", [".pte", ".pt"])
def test_a_float_file_is_compared_on_the_data_and_says_so(
    model: nn.Module, x: Tensor, suffix: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "inputs.npy", image(20, 3, 16, 16, seed=4).numpy())
    artifact = torchfuse.export(
        model, x, tmp_path / f"m{suffix}", data=tmp_path / "inputs.npy", random_examples=True
    )
    assert artifact.verified_on == "7 inputs of 'inputs.npy'"
    assert "compared with the model on 7 inputs of 'inputs.npy':" in str(artifact)
    assert artifact.equivalence is not None
    assert [output.name for output in artifact.equivalence.outputs] == ["output", "data, output"]
    metadata = check(artifact.path).metadata
    assert metadata is not None
    assert metadata["verified"]["on"] == artifact.verified_on


def test_what_a_file_was_compared_on_is_said_in_words(
    model: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    def said(**options: Any) -> str | None:
        examples = options.pop("examples", x)
        return torchfuse.export(model, examples, tmp_path / "m.pt", **options).verified_on

    assert said() == "the example"
    assert said(examples=[x, x + 1]) == "2 examples"
    assert said(random_examples=True) == "random inputs only"
    assert said(data="random") == "the example and random inputs"
    assert said(data="random", random_examples=True) == "random inputs only"
    assert said(data=[x + 1]) == "the example and 1 input of 1 given case"


def test_int8_is_compared_on_what_it_was_calibrated_on_unless_there_is_other_data(
    model: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    calibration = [image(1, 3, 16, 16, seed=seed) for seed in range(4)]
    options: Any = {"precision": "int8", "calibration": calibration}
    artifact = torchfuse.export(model, x, tmp_path / "m.pte", **options)
    assert artifact.verified_on == "the example and 4 inputs of 4 given cases"
    artifact = torchfuse.export(model, x, tmp_path / "m.pte", **options, data=calibration[:3])
    assert artifact.verified_on == "the example and 3 inputs of 3 given cases"


def test_data_of_which_nothing_has_the_examples_shape_is_an_error(
    model: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match=r"in the shape of the example, forward\(1×3×16×16"):
        torchfuse.export(model, x, tmp_path / "m.pte", data=image(2, 3, 8, 8))
    assert list(tmp_path.iterdir()) == []
