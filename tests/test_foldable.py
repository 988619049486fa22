"""The oracle of the coverage tests counts what can be folded, and nothing else."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.foldable import Count, count
from support.zoo import HAND_WRITTEN

IMAGE = torch.randn(2, 4, 8, 8)


class Model(nn.Module):
    """A conv, a linear and a batch norm, used as `body` says."""

    def __init__(self, body: Callable[["Model", Tensor], object]):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(8, 8)
        self.drop = nn.Dropout()
        self.bn = nn.BatchNorm2d(4)
        self.bn1d = nn.BatchNorm1d(8)
        self.body = body

    def forward(self, x: Tensor) -> object:
        return self.body(self, x)


@pytest.mark.parametrize(
    ("expected", "body"),
    [
        (1, lambda m, x: m.bn(m.conv(x))),
        (1, lambda m, x: m.bn(m.drop(m.conv(x)))),
        (1, lambda m, x: m.bn(F.conv_transpose2d(x, m.conv.weight))),
        (1, lambda m, x: m.bn1d(m.linear(x).flatten(0, 2))),
        (1, lambda m, x: m.bn1d(m.linear(x[:, 0]).transpose(1, 2))),
        (1, lambda m, x: m.bn1d((y := m.linear(x)).flatten(0, 2)).reshape_as(y)),
        (1, lambda m, x: m.bn(m.conv(x).view(2, 4, 64, 1))),
        (0, lambda m, x: m.bn(x)),
        (0, lambda m, x: m.bn(F.relu(m.conv(x)))),
        (0, lambda m, x: (m.bn(y := m.conv(x)), y)),
        (0, lambda m, x: m.conv(m.bn(m.conv(x)))),
        (0, lambda m, x: m.bn(m.conv2(m.bn(m.conv(x))))),
        (0, lambda m, x: m.bn(m.conv(x).transpose(1, 2).reshape(2, 4, 8, 8))),
        (0, lambda m, x: m.bn1d(m.linear(x[:, 0]))),
        (0, lambda m, x: m.bn(m.conv(x)) + m.conv.weight.mean()),
    ],
)
def test_a_batch_norm_counts_if_it_follows_its_layer_alone(
    expected: int, body: Callable[[Model, Tensor], object]
) -> None:
    assert count(Model(body).eval(), IMAGE).foldable == expected


def test_a_batch_norm_in_training_mode_does_not_count() -> None:
    model = Model(lambda m, x: m.bn(m.conv(x))).eval()
    model.bn.train()
    assert count(model, IMAGE).foldable == 0


def test_the_known_models_have_the_counts_of_their_papers() -> None:
    counts = {entry.name: count(entry.model(), entry.inputs()) for entry in HAND_WRITTEN[:4]}
    assert counts == {
        "ResNet, basic": Count(20, 20),  # ResNet-18
        "ResNet, bottleneck": Count(20, 20),
        "MobileNetV2": Count(52, 52),
        "MobileNetV3": Count(14, 14),
    }
