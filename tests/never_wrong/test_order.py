"""What counts is the order of calls, not of registration.

The numbers are upstream issues: pt is pytorch/pytorch, ao pytorch/ao.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from support.fusing_checks import (
    IMAGE,
    ConvBn,
    assert_fuses,
    assert_skipped,
    check_not_folded,
    trained,
)


def test_registration_order_means_nothing_conv_relu_bn() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(F.relu(self.conv(x)))

    assert_skipped(trained(Model(), IMAGE), IMAGE, because="relu")


def test_a_batch_norm_before_its_conv_is_skipped_pt144403() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.bn(x))

    check_not_folded(Model())


def test_a_relu_module_used_in_several_places_stays_right_pt52584() -> None:
    class Model(ConvBn):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.conv2(self.relu(self.bn(self.conv(x)))) + x)

    assert_fuses(trained(Model(), IMAGE), IMAGE)


def test_max_pooling_between_is_skipped() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(F.max_pool2d(self.conv(x), 2))

    check_not_folded(Model())
