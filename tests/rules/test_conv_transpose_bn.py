"""Transposed conv → batch norm: what fuses, and what is skipped."""

import pytest
import torch
from torch import nn

from support.fusing_checks import ConvBn, assert_fuses_in_both_hosts, assert_skipped, trained

CONVS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def images(dims):
    return torch.randn(2, 4, *[5] * dims, generator=torch.Generator().manual_seed(dims))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_fuses_over_bias_groups_and_dimensions(dims, bias, groups):
    torch.manual_seed(0)
    conv = CONVS[dims](4, 8, 3, stride=2, output_padding=1, bias=bias, groups=groups)
    assert_fuses_in_both_hosts(trained(ConvBn(conv, NORMS[dims](8)), images(dims)), images(dims))


def test_as_many_channels_out_as_in_are_not_mixed_up():
    torch.manual_seed(0)
    assert_fuses_in_both_hosts(trained(ConvBn(nn.ConvTranspose2d(4, 4, 3)), images(2)), images(2))


def test_skipped_if_its_output_has_a_second_reader():
    class Model(ConvBn):
        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + y

    torch.manual_seed(0)
    model = trained(Model(nn.ConvTranspose2d(4, 4, 3)), images(2))
    assert_skipped(model, images(2), because="output of `conv` is also read by another use: add")
