"""A 1×1 convolution or a linear layer is moved behind an average."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from support.rewriting_checks import fused, rules

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

X = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
LAYERS = {
    "conv": nn.Conv2d(4, 2, 1),
    "grouped": nn.Conv2d(4, 2, 1, groups=2),
    "conv3": nn.Conv2d(4, 2, 3),
    "line": nn.Linear(6, 5),
    "pool": nn.AdaptiveAvgPool2d(1),
}

MOVES = {
    "an average pool": lambda m, x: F.avg_pool2d(m.conv(x), 2),
    "an adaptive one": lambda m, x: m.pool(m.conv(x)),
    "a mean": lambda m, x: m.conv(x).mean((2, 3), keepdim=True),
    "a mean without the dimensions": lambda m, x: m.conv(x).mean((2, 3)),
    "a mean over tokens": lambda m, x: m.line(x).mean(1),
    "a mean over two axes of tokens": lambda m, x: m.line(x).mean((1, 2)),
}


@pytest.mark.parametrize("name", MOVES)
def test_it_is_moved(name: str) -> None:
    result = fused(MOVES[name], X, **LAYERS)
    assert rules(result) == ["layer_pool"]
    last = [node for node in result.model.graph.nodes if node.op == "call_function"][-1]
    assert str(last.target).startswith(("aten.conv2d", "aten.linear"))


STAYS = {
    "a kernel": lambda m, x: F.avg_pool2d(m.conv3(x), 2),
    "a pool with padding": lambda m, x: F.avg_pool2d(m.conv(x), 2, 2, 1),
    "a mean over the channels": lambda m, x: m.conv(x).mean(1, keepdim=True),
    "a mean over the features": lambda m, x: m.line(x).mean(-1),
    "a maximum": lambda m, x: F.max_pool2d(m.conv(x), 2),
    "a mean over rows": lambda m, x: m.conv(x).mean(2),
    "a grouped one, without the dimensions": lambda m, x: m.grouped(x).mean((2, 3)),
    "a mean of channels and columns": lambda m, x: m.conv(x).mean((1, 3)),
}


@pytest.mark.parametrize("name", STAYS)
def test_it_stays(name: str) -> None:
    assert fused(STAYS[name], X, **LAYERS).plan.fusions == ()
