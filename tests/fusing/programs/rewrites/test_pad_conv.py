"""Zero padding before a convolution is taken into it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from support.rewriting_checks import calls, fused, reasons

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

X = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
LAYERS = {
    "conv": nn.Conv2d(4, 2, 3, 2, 1),
    "zero": nn.ZeroPad2d(1),
    "one": nn.Conv1d(8, 3, 3),
    "even": nn.Conv2d(4, 2, 2, 2),
    "step": nn.Conv2d(4, 2, 3, 2),
}

TAKES_IN = {
    "F.pad": lambda m, x: m.conv(F.pad(x, (1, 1, 2, 2))),
    "one axis": lambda m, x: m.conv(F.pad(x, (2, 2))),
    "a module": lambda m, x: m.conv(m.zero(x)),
    "one dimension": lambda m, x: m.one(F.pad(x[:, 0], (1, 1))),
    "more before, and no window reaches what comes after": (
        lambda m, x: m.step(F.pad(x, (1, 0, 1, 0)))
    ),
    "zeros after that no window reaches": lambda m, x: m.even(F.pad(x, (0, 1, 0, 1))),
    "one axis on both sides, the other on one": lambda m, x: m.step(F.pad(x, (1, 1, 1, 0))),
}


@pytest.mark.parametrize("name", TAKES_IN)
def test_it_is_taken_in(name: str) -> None:
    assert not {"pad", "constant_pad_nd"} & calls(fused(TAKES_IN[name], X, **LAYERS)).keys()


def test_one_side_that_is_reached_stays_and_says_why() -> None:
    for sides in ((0, 1, 0, 1), (1, 1, 0, 1)):
        result = fused(lambda m, x, sides=sides: m.step(F.pad(x, sides)), X, **LAYERS)
        assert result.plan.fusions == ()
        assert calls(result) == {"pad": 1, "conv2d": 1}
        assert (
            "pad_conv: What is padded before it is not the same on both sides (0 and 1), as a "
            "convolution's own padding is, and a larger kernel with zeros in it would take more "
            "multiply-adds."
        ) in reasons(result)


def test_what_is_out_of_reach_at_one_size_is_not_at_all() -> None:
    sizes = ({2: Dim("height", min=4, max=64)},)
    left = fused(lambda m, x: m.even(F.pad(x, (0, 0, 0, 1))), X, dynamic=sizes, **LAYERS)
    assert left.plan.fusions == ()
    even = ({2: 2 * Dim("half", min=2, max=32)},)
    taken = fused(lambda m, x: m.even(F.pad(x, (0, 0, 0, 1))), X, dynamic=even, **LAYERS)
    assert calls(taken) == {"conv2d": 1}


STAYS = {
    "one side": lambda m, x: m.conv(F.pad(x, (0, 1, 0, 1))),
    "more before, which no longer reaches": lambda m, x: m.even(F.pad(x, (2, -1, 0, 0))),
    "another value": lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1), value=1.0)),
    "a reflection": lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "less than nothing": lambda m, x: m.conv(F.pad(x, (-1, -1))),
    "the channels": lambda m, x: m.conv(F.pad(x[:, 1:3], (0, 0, 0, 0, 1, 1))),
}


@pytest.mark.parametrize("name", STAYS)
def test_it_stays(name: str) -> None:
    assert fused(STAYS[name], X, **LAYERS).plan.fusions == ()
