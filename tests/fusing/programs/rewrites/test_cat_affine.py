"""A norm over a concatenation of layers is taken into each of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.rewriting_checks import Model, calls, fused, reasons

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

X = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
LAYERS = {
    "a": nn.Conv2d(4, 3, 1, bias=False),
    "b": nn.Conv2d(4, 5, 3, padding=1),
    "bn": nn.BatchNorm2d(8),
}


def test_bottleneck_csp() -> None:
    """As YOLOv5 has it: an activation follows the norm."""
    result = fused(
        lambda m, x: F.leaky_relu(m.bn(torch.cat([m.a(F.relu(x)), m.b(x)], 1))), X, **LAYERS
    )
    assert calls(result) == {"relu": 1, "conv2d": 2, "cat": 1, "leaky_relu": 1}


def test_a_number_over_any_axis() -> None:
    assert calls(fused(lambda m, x: torch.cat([m.a(x), m.b(x)], 1) * 2, X, **LAYERS)) == {
        "conv2d": 2,
        "cat": 1,
    }


def test_a_part_that_is_no_layer_is_named() -> None:
    result = fused(lambda m, x: m.bn(torch.cat([F.relu(x), x], 1)), X, **LAYERS)
    assert result.plan.fusions == ()
    mixed = fused(lambda m, x: m.bn(torch.cat([m.a(x), m.a(x)[:, :1], x], 1)), X, **LAYERS)
    assert mixed.plan.fusions == ()
    assert "does not come straight from a layer" in reasons(mixed)


def test_parts_that_others_read_stay() -> None:
    """As DenseNet has it."""

    def body(m: Model, x: Tensor) -> object:
        y = m.a(x)
        return m.bn(torch.cat([y, m.b(x)], 1)), y

    result = fused(body, X, **LAYERS)
    assert result.plan.fusions == ()
    assert "is also an output of the model" in reasons(result)


def test_a_part_twice_stays() -> None:
    result = fused(lambda m, x: (torch.cat([y := m.a(x), y], 1)) * 2, X, **LAYERS)
    assert result.plan.fusions == ()
