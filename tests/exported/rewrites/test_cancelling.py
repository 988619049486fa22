"""Calls of which the second undoes the first, or does it again."""

import pytest
import torch
import torch.nn.functional as F

from rewriting_checks import calls, fused

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

X = torch.randn(2, 4, 6, 3, generator=torch.Generator().manual_seed(0))

CANCELS = {
    "transposes": lambda m, x: F.gelu(x.transpose(1, 2).transpose(2, 1)),
    "permutations": lambda m, x: F.gelu(x.permute(0, 2, 3, 1).permute(0, 3, 1, 2)),
    "a transpose and a permutation": lambda m, x: F.gelu(x.transpose(-1, 2).permute(0, 1, 3, 2)),
    "negations": lambda m, x: F.gelu(x.neg().neg()),
}


@pytest.mark.parametrize("name", CANCELS)
def test_both_go(name: str) -> None:
    assert calls(fused(CANCELS[name], X)) == {"gelu": 1}


def test_a_relu_of_a_relu_is_one() -> None:
    assert calls(fused(lambda m, x: F.relu(F.relu(x)) + 0.5, X)) == {"relu": 1, "add": 1}


def test_what_is_read_in_between_stays() -> None:
    result = fused(lambda m, x: (F.gelu((y := x.transpose(1, 2)).transpose(1, 2)), F.relu(y)), X)
    assert calls(result)["gelu"] == 1
    assert "relu" in calls(result)


def test_other_permutations_stay() -> None:
    left = calls(fused(lambda m, x: F.gelu(x.permute(0, 2, 3, 1).permute(0, 2, 3, 1)), X))
    assert left["permute"] == 2
