"""A fold is as exact as the dtype allows, or is not done."""

import pytest
import torch
from torch import Tensor, nn

import torchfuse
from support.fusing_checks import IMAGE, ConvBn, assert_fuses, check, trained
from torchfuse.errors import InputError


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_as_exact_as_the_dtype_allows(dtype: torch.dtype) -> None:
    model = trained(ConvBn(), IMAGE).to(dtype)
    assert_fuses(model, IMAGE.to(dtype))


def test_a_bfloat16_conv_before_a_float32_batch_norm_is_no_less_exact_than_before() -> None:
    model = trained(ConvBn(), IMAGE)
    exact = torchfuse.fuse(model, IMAGE).model.double()(IMAGE.double())
    model.conv.to(torch.bfloat16)
    images = IMAGE.to(torch.bfloat16)
    result = check(model, images)
    before = (model(images).double() - exact).abs().max()
    after = (result.model(images).double() - exact).abs().max()
    assert after <= 2 * before


def test_a_cast_between_conv_and_batch_norm_stays_right() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x.to(torch.bfloat16)).float())

    model = trained(Model(nn.Conv2d(4, 4, 3, dtype=torch.bfloat16)), IMAGE)
    reference = model(IMAGE)
    result = torchfuse.fuse(model, IMAGE)
    assert result.model(IMAGE).dtype == torch.float32
    assert (result.model(IMAGE) - reference).abs().max() / reference.abs().max() < 3e-2


def test_autocast_inside_the_model_stays_right() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.bn(self.conv(x)).float()

    model = trained(Model(), IMAGE)
    reference = model(IMAGE)
    result = torchfuse.fuse(model, IMAGE)
    assert (result.model(IMAGE) - reference).abs().max() / reference.abs().max() < 3e-2


def test_a_complex_conv_is_skipped_or_right() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, dtype=torch.complex64)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x.to(torch.complex64)).real)

    check(trained(Model(), IMAGE), IMAGE)


def test_a_variance_of_almost_zero_stays_right() -> None:
    model = trained(ConvBn(), IMAGE)
    model.bn.running_var[1] = 1e-14
    model.bn.running_mean[1] = 0.1
    check(model, IMAGE)


def test_a_gamma_of_zero_stays_right() -> None:
    model = trained(ConvBn(), IMAGE)
    with torch.no_grad():
        model.bn.weight.zero_()
    check(model, IMAGE)


def test_nan_in_the_weights_does_not_pass_as_proof() -> None:
    model = trained(ConvBn(), IMAGE)
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"'conv\.weight' has NaN in 1 of its 144 values"):
        torchfuse.fuse(model, IMAGE)
