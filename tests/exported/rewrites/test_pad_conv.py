"""Zero padding before a convolution is taken into it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriting_checks import calls, fused

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

X = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
LAYERS = {"conv": nn.Conv2d(4, 2, 3, 2, 1), "zero": nn.ZeroPad2d(1), "one": nn.Conv1d(8, 3, 3)}

TAKES_IN = {
    "F.pad": lambda m, x: m.conv(F.pad(x, (1, 1, 2, 2))),
    "one axis": lambda m, x: m.conv(F.pad(x, (2, 2))),
    "a module": lambda m, x: m.conv(m.zero(x)),
    "one dimension": lambda m, x: m.one(F.pad(x[:, 0], (1, 1))),
}


@pytest.mark.parametrize("name", TAKES_IN)
def test_it_is_taken_in(name: str) -> None:
    assert not {"pad", "constant_pad_nd"} & calls(fused(TAKES_IN[name], X, **LAYERS)).keys()


STAYS = {
    "one side": lambda m, x: m.conv(F.pad(x, (0, 1, 0, 1))),
    "another value": lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1), value=1.0)),
    "a reflection": lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "less than nothing": lambda m, x: m.conv(F.pad(x, (-1, -1))),
    "the channels": lambda m, x: m.conv(F.pad(x[:, 1:3], (0, 0, 0, 0, 1, 1))),
}


@pytest.mark.parametrize("name", STAYS)
def test_it_stays(name: str) -> None:
    assert fused(STAYS[name], X, **LAYERS).plan.fusions == ()
