"""Scales and shifts in a row become one, where that takes fewer calls."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from support.rewriting_checks import calls, fused

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

X = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
LAYERS = {"bn": nn.BatchNorm2d(4), "bn2": nn.BatchNorm2d(4)}

MERGES = {
    "two batch norms": ({"batch_norm": 1}, lambda m, x: m.bn2(m.bn(x))),
    "a batch norm and numbers": ({"batch_norm": 1}, lambda m, x: m.bn(x * 2 + 1) / 3),
    "a batch norm as arithmetic": (
        {"batch_norm": 1},
        lambda m, x: x * m.bn.weight[:, None, None] + m.bn.bias[:, None, None],
    ),
    "factors": ({"mul": 1}, lambda m, x: (x * 2) * 3 / 5),
    "summands": ({"add": 1}, lambda m, x: x + 2 - 5),
    "what cancels": ({"relu": 1}, lambda m, x: F.relu((x * 2) / 2)),
}


@pytest.mark.parametrize("name", MERGES)
def test_it_becomes_one(name: str) -> None:
    left, body = MERGES[name]
    assert calls(fused(body, X, **LAYERS)) == left


def test_a_factor_and_a_summand_along_the_last_axis_stay_two() -> None:
    result = fused(lambda m, x: x * m.w.weight[0] + m.w.bias[0], X, w=nn.Linear(6, 4))
    assert calls(result)["mul"] == calls(result)["add"] == 1


def test_scales_of_two_axes_stay() -> None:
    result = fused(lambda m, x: m.bn(x) * m.w.weight[0], X, w=nn.Linear(6, 4), **LAYERS)
    assert result.plan.fusions == ()
