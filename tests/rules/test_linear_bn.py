"""linear → batch norm: what fuses, and what is skipped."""

import pytest
import torch
from torch import nn

from support.fusing_checks import ConvBn, assert_fuses_in_both_hosts, assert_skipped, trained

ROWS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
SEQUENCES = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_fuses_over_bias_and_affine(bias, affine):
    torch.manual_seed(0)
    model = ConvBn(nn.Linear(5, 3, bias=bias), nn.BatchNorm1d(3, affine=affine))
    assert_fuses_in_both_hosts(trained(model, ROWS), ROWS)


class Flattened(ConvBn):
    """As in LeViT."""

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y.flatten(0, 1)).reshape_as(y)


class Transposed(ConvBn):
    def forward(self, x):
        return self.bn(self.conv(x).transpose(1, 2))


@pytest.mark.parametrize("model", [Flattened, Transposed])
def test_looks_through_what_moves_the_features_to_axis_1(model):
    torch.manual_seed(0)
    assert_fuses_in_both_hosts(
        trained(model(nn.Linear(5, 7), nn.BatchNorm1d(7)), SEQUENCES), SEQUENCES
    )


@pytest.mark.parametrize("features", [3, 4])
def test_skipped_where_axis_1_holds_no_features_ao4116(features):
    torch.manual_seed(0)
    inputs = torch.randn(4, 3, 5)
    model = ConvBn(nn.Linear(5, features), nn.BatchNorm1d(3))
    assert_skipped(trained(model, inputs), inputs, because="axis 1 .* not the channel axis")
