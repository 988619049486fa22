"""Every kind of convolution and linear is folded on the right axis, or skipped.

The numbers are upstream issues: pt is pytorch/pytorch, ao pytorch/ao.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.fusing_checks import (
    IMAGE,
    ROW,
    ConvBn,
    assert_fuses,
    assert_skipped,
    check,
    trained,
)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_a_grouped_transposed_conv_is_folded_exactly_pt180995(groups: int, bias: bool) -> None:
    conv = nn.ConvTranspose2d(4, 8, 3, 2, 1, output_padding=1, groups=groups, bias=bias)
    assert_fuses(trained(ConvBn(conv, nn.BatchNorm2d(8)), IMAGE), IMAGE)


def test_a_transposed_conv_with_as_many_inputs_as_outputs_is_folded_exactly() -> None:
    # The wrong axis of a square weight raises no error.
    assert_fuses(trained(ConvBn(nn.ConvTranspose2d(4, 4, 2, 2)), IMAGE), IMAGE)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions_are_folded_exactly(dims: int) -> None:
    inputs = torch.randn(2, 4, *(5,) * dims)
    for kind in ("Conv", "ConvTranspose"):
        conv = getattr(nn, f"{kind}{dims}d")(4, 6, 3, groups=2)
        norm = getattr(nn, f"BatchNorm{dims}d")(6)
        assert_fuses(trained(ConvBn(conv, norm), inputs), inputs)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_paddings_are_folded_exactly(mode: str) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode, bias=False)
    assert_fuses(trained(ConvBn(conv, nn.BatchNorm2d(6)), IMAGE), IMAGE)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_paddings_by_name_are_folded_exactly(padding: str) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=padding, dilation=2)
    assert_fuses(trained(ConvBn(conv, nn.BatchNorm2d(6)), IMAGE), IMAGE)


def test_a_linear_on_rows_is_folded_exactly_pt72049() -> None:
    assert_fuses(trained(ConvBn(nn.Linear(5, 3), nn.BatchNorm1d(3)), ROW), ROW)


def test_a_linear_whose_features_are_not_the_channels_is_skipped_ao4116() -> None:
    inputs = torch.randn(3, 4, 4)  # N, C, L with C equal to L: no shape gives it away
    model = trained(ConvBn(nn.Linear(4, 4), nn.BatchNorm1d(4)), inputs)
    assert_skipped(model, inputs, because="(channel|axis|dimension|3-D)")


def test_a_linear_flattened_to_rows_is_folded_exactly() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y.flatten(0, 1)).reshape_as(y)

    inputs = torch.randn(3, 4, 5)
    assert_fuses(trained(Model(nn.Linear(5, 6), nn.BatchNorm1d(6)), inputs), inputs)


def test_a_linear_transposed_to_channels_is_folded_exactly() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x).transpose(1, 2))

    inputs = torch.randn(3, 4, 5)
    check(trained(Model(nn.Linear(5, 6), nn.BatchNorm1d(6)), inputs), inputs)


def test_a_reshape_that_mixes_channels_is_skipped() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)  # [N, 4, 8, 8]: rows and channels change places
            return self.bn(y.transpose(1, 2).reshape(y.shape[0], 4, -1))

    model = trained(Model(None, nn.BatchNorm1d(4)), IMAGE)
    assert_skipped(model, IMAGE, because="(channel|axis|reshape|transpose)")


def test_unbatched_images_are_folded_exactly() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(torch.stack([self.conv(x[0]), x[1]]))

    check(trained(Model(), IMAGE), IMAGE)


def test_a_conv_that_treats_its_bias_otherwise_than_torch_is_skipped() -> None:
    class Doubling(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if self.bias is None else y * 2

    model = trained(ConvBn(Doubling(4, 4, 3, bias=False)), IMAGE)
    assert_skipped(model, IMAGE, because="bias")


def test_a_conv_that_asks_whether_it_has_a_bias_and_hands_it_on_is_folded_exactly() -> None:
    class Asking(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, None if self.bias is None else self.bias)

    assert_fuses(trained(ConvBn(Asking(4, 4, 3, bias=False)), IMAGE), IMAGE)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_made_of_the_result_is_no_obstacle() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            return torch.nested.nested_tensor([y[0], y[1]]).to_padded_tensor(0.0)

    assert_fuses(trained(Model(), IMAGE), IMAGE)
