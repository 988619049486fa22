"""Static int8 is close to the model, and unfit calibration data is an error."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchfuse.cases import Case
from torchfuse.errors import CalibrationError, InputError
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.lowering.capture import capture
from torchfuse.quantizing import QuantizedLayer, quantize
from torchfuse.targets.executorch.program import ExecutorchModel
from torchfuse.targets.executorch.xnnpack import lower
from torchfuse.verifying.outputs import verify


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Residual(nn.Module):
    """The conv's output feeds a batch norm and an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.bn.running_mean.copy_(image(8, seed=1))
            self.bn.running_var.copy_(image(8, seed=2).abs() + 0.5)
            self.bn.weight.copy_(image(8, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = self.up(torch.relu(self.bn(y) + y))
        return self.head(nn.functional.adaptive_avg_pool2d(y, 1).flatten(1))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture
def x() -> Tensor:
    return image(1, 3, 8, 8)


def images() -> list[Tensor]:
    return [image(4, 3, 8, 8, seed=seed) for seed in range(4)]


def test_is_close_to_the_model_where_a_conv_output_has_two_users(
    model: nn.Module, x: Tensor
) -> None:
    # torchao's prepare_pt2e folds this batch norm into the conv that the addition reads too.
    quantized = quantize(model, x, images()).model
    assert verify(model, quantized, image(1, 3, 8, 8, seed=9), min_sqnr_db=25).passed


def test_every_layer_is_listed_with_its_precision(model: nn.Module, x: Tensor) -> None:
    assert quantize(model, x, images()).layers == (
        QuantizedLayer("conv", "conv2d", int8=True),
        QuantizedLayer("bn", "conv2d", int8=True),
        QuantizedLayer("up", "conv_transpose2d", int8=True),
        QuantizedLayer("head", "linear", int8=True),
    )


def test_a_layer_that_has_no_int8_form_is_listed_as_such() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Conv2d(4, 4, 3)).eval()
    layers = quantize(model, image(1, 4, 6, 6), image(4, 4, 6, 6)).layers
    assert layers == (
        QuantizedLayer("0", "conv_transpose2d", int8=False),
        QuantizedLayer("1", "conv2d", int8=True),
    )


def test_a_layer_that_is_called_twice_is_int8_both_times() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.relu(self.conv(x)))

    model = Twice().eval()
    result = quantize(model, image(1, 3, 8, 8), images(), recovery=["equalization", "rounding"])
    assert [layer.int8 for layer in result.layers] == [True, True]
    assert verify(model, result.model, image(1, 3, 8, 8, seed=9), min_sqnr_db=25).passed


def test_weights_have_a_scale_per_channel() -> None:
    conv = nn.Conv2d(1, 2, 1, bias=False).eval()
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1000.0, 1.0]).reshape(2, 1, 1, 1))
    quantized = quantize(conv, image(1, 1, 8, 8), image(8, 1, 8, 8)).model
    (weight,) = [t for t in quantized.state_dict().values() if t.dtype is torch.int8]
    assert weight.flatten().tolist() == [127, 127]  # with one scale for both: [127, 0]


def test_channels_with_small_weights_have_scales_as_small_when_careful() -> None:
    """ExecuTorch's recipe has none below 2⁻¹², which leaves a sign of weights up to 0.003."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, bias=False).eval()
    with torch.no_grad():
        conv.weight.mul_(1e-3)
    data = [image(1, 3, 8, 8, seed=seed) for seed in range(12)]
    plain = quantize(conv, data[0], data).model
    careful = quantize(conv, data[0], data, recovery=["careful_ranges"]).model
    assert not verify(conv, plain, data[:3], min_sqnr_db=10).passed
    assert verify(conv, careful, data[:3], min_sqnr_db=25).passed


def test_scales_leave_room_for_the_bias_in_int32() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 2, 3).eval()
    with torch.no_grad():
        conv.weight.mul_(1e-9)
        conv.bias.copy_(torch.tensor([3.0, -40.0]))
    data = [image(1, 3, 8, 8, seed=seed) for seed in range(12)]
    careful = quantize(conv, data[0], data, recovery=["careful_ranges"]).model
    lowered = lower(capture(careful, Case((data[0],))))
    run = ExecutorchModel(lowered.program, lowered.signature)
    assert verify(conv, run, data[:3], min_sqnr_db=40).passed


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-1, 1)], ids=str)
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 4, 3), (2, 3, 6, 6)),
        (nn.ConvTranspose2d(3, 4, 3), (2, 3, 6, 6)),
        (nn.Linear(5, 4), (2, 5)),
    ],
    ids=["conv", "transposed", "linear"],
)
def test_a_layer_and_its_activation_are_one_in_int8(
    layer: nn.Module, shape: tuple[int, ...], activation: nn.Module
) -> None:
    model = nn.Sequential(layer, activation).eval()
    quantized = quantize(model, image(*shape), image(*shape)).model
    calls = [str(node.target) for node in quantized.graph.nodes if node.op == "call_function"]
    (position,) = [i for i, call in enumerate(calls) if re.search(r"relu|hardtanh", call)]
    assert re.search(r"conv|linear", calls[position - 1])  # and no quantization in between
    lowered = lower(capture(quantized, Case((image(*shape),))))
    assert lowered.delegation.calls_left == 0
    run = ExecutorchModel(lowered.program, lowered.signature)
    assert verify(quantized, run, image(*shape, seed=5), min_sqnr_db=30).passed


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()], ids=str)
def test_an_addition_and_its_activation_are_delegated(activation: nn.Module) -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.activation = activation

        def forward(self, x: Tensor) -> Tensor:
            return self.activation(self.conv(x) + x)

    x = image(1, 3, 6, 6)
    quantized = quantize(Adds().eval(), x, image(4, 3, 6, 6)).model
    lowered = lower(capture(quantized, Case((x,))))
    assert lowered.delegation.calls_left == 0
    run = ExecutorchModel(lowered.program, lowered.signature)
    assert verify(quantized, run, x, min_sqnr_db=30).passed


def test_executorchs_own_functions_are_as_before_afterwards(model: nn.Module, x: Tensor) -> None:
    with known_warnings_ignored():
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer_utils
    before = xnnpack_quantizer_utils.is_relu_node
    quantize(model, x, images())
    assert xnnpack_quantizer_utils.is_relu_node is before


def test_an_identity_put_in_place_of_another_module_has_no_mode(
    model: nn.Module, x: Tensor
) -> None:
    model.head = nn.Identity()
    quantize(model, x, images())


def generated() -> Iterator[Tensor]:
    yield from images()


@pytest.mark.parametrize(
    "calibration",
    [
        images(),
        image(8, 3, 8, 8),
        (image(1, 3, 8, 8),),
        {"x": image(1, 3, 8, 8)},
        generated(),
        [image(4, 3, 12, 10), image(2, 3, 8, 8)],
    ],
    ids=["list", "tensor", "tuple", "dict", "generator", "other sizes"],
)
def test_calibration_data_may_be(calibration: Any, model: nn.Module, x: Tensor) -> None:
    example = {"x": x} if isinstance(calibration, dict) else x
    quantized = quantize(model, example, calibration).model
    assert verify(model, quantized, example, min_sqnr_db=15).passed


class Product(nn.Module):
    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        return x @ (k + k)


class Sum(nn.Module):
    def forward(self, *xs: Tensor) -> Tensor:
        return xs[0] + xs[1]


@pytest.mark.parametrize(
    ("model", "example", "calibration"),
    [
        (
            Product(),
            Case((image(1, 4),), {"k": image(4, 4)}),
            [Case((image(3, 4),), {"k": image(4, 4)})],
        ),
        (Sum(), (image(1, 4), image(1, 4)), [(image(3, 4), image(3, 4))]),
    ],
    ids=["positions and names", "any number"],
)
def test_sizes_may_differ_however_the_arguments_are_given(
    model: nn.Module, example: Any, calibration: Any
) -> None:
    quantized = quantize(model.eval(), example, calibration).model
    assert verify(model, quantized, example, min_sqnr_db=15).passed


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "Expected calibration data, got None: static int8 needs the ranges"),
        ([], "The calibration data is empty"),
        (iter([]), "The calibration data is empty"),
        (torch.zeros(0, 3, 8, 8), r"case 0, forward\(0×3×8×8\), has a tensor without elements"),
        (torch.full((2, 3, 8, 8), 7.0), r"constant \(every value is 7.0\)"),
        ([torch.zeros(1, 3, 8, 8)] * 3, r"constant \(every value is 0.0\)"),
        ([image(1, 3, 8, 8), torch.full((1, 3, 8, 8), torch.nan)], "case 1, .*, holds NaN or Inf"),
        (torch.full((1, 3, 8, 8), torch.inf), "case 0, .*, holds NaN or Inf"),
        (image(2, 4, 8, 8), r"Residual cannot run on forward\(2×4×8×8\), .*: Given groups=1"),
        ([image(2, 3, 8, 8), image(1, 3)], r"cannot run on calibration case 1, forward\(1×3\)"),
    ],
)
def test_unfit_calibration_data_is_an_error(
    calibration: Any, message: str, model: nn.Module, x: Tensor
) -> None:
    with pytest.raises(CalibrationError, match=message):
        quantize(model, x, calibration)


def test_a_model_that_overflows_on_the_calibration_data_is_an_error() -> None:
    class Exponential(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(x)

    with pytest.raises(CalibrationError, match="returns NaN or Inf for calibration case 0"):
        quantize(Exponential().eval(), image(2, 3), image(2, 3) * 1e4)


def test_one_constant_input_among_others_is_fine() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.linear(x) * scale

    case = (image(2, 3), torch.ones(1))
    assert len(quantize(Scaled().eval(), case, case).layers) == 1


def test_a_model_in_training_mode_is_an_error(x: Tensor) -> None:
    with pytest.raises(InputError, match=r"in training mode; call model\.eval"):
        quantize(Residual(), x, images())


@pytest.mark.parametrize("backend", ["xnnpack", "qnnpack"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_in_another_precision_is_an_error(
    model: nn.Module, x: Tensor, dtype: torch.dtype, backend: str
) -> None:
    sentence = (
        f"Expected a model in float32, got {dtype} ('conv.weight'); call model.float() first."
    )
    for given in (x, x.to(dtype)):
        with pytest.raises(InputError) as caught:
            quantize(model.to(dtype), given, [given], backend=backend)
        assert str(caught.value) == sentence


@pytest.mark.parametrize("scheme", ["int8", "int8_dynamic", "int4"])
def test_nan_in_the_weights_is_an_error_that_names_the_tensor(
    model: nn.Module, x: Tensor, scheme: str
) -> None:
    with torch.no_grad():
        model.head.weight[1, 2] = torch.nan
    with pytest.raises(
        InputError, match=r"finite weights, but 'head.weight' has NaN in 1 of its 40"
    ):
        quantize(model, x, images() if scheme == "int8" else None, scheme=scheme)


def test_an_unknown_backend_is_an_error(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(InputError, match=r"Expected a backend of xnnpack, qnnpack, .*, got 'npu'"):
        quantize(model, x, images(), backend="npu")


def test_the_model_is_left_as_it_was(model: nn.Module, x: Tensor) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantize(model, x, images())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not model.training


def test_the_quantized_model_shares_no_tensor_with_the_model(model: nn.Module, x: Tensor) -> None:
    result = quantize(model, x, images())
    given = {tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()}
    made = {tensor.data_ptr() for tensor in result.model.state_dict().values() if tensor.numel()}
    assert not given & made
