"""Functional calls are neither ignored nor mistaken for modules.

The numbers are upstream issues: pt is pytorch/pytorch, ao pytorch/ao.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusing_checks import IMAGE, ConvBn, check, check_not_folded, trained


def test_a_functional_batch_norm_is_not_ignored_pt122070() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            bn = self.bn
            y = self.conv(x)
            return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False)

    result = check(trained(Model(), IMAGE), IMAGE)
    assert result.plan.fusions or result.plan.skips, "not even mentioned"


def test_a_functional_conv_is_not_ignored() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 3, 3) * 0.1)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(F.conv2d(x, self.weight, padding=1))

    result = check(trained(Model(), IMAGE), IMAGE)
    assert result.plan.fusions or result.plan.skips, "not even mentioned"


def test_a_functional_conv_whose_weight_is_computed_stays_right() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(F.conv2d(x, self.conv.weight * 2 + 0.1))

    check_not_folded(Model())


def test_a_dynamic_conv_whose_weight_depends_on_the_input_stays_right() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(F.conv2d(x, self.conv.weight * x.mean().sigmoid()))

    check_not_folded(Model())
