"""Calls of which the second undoes the first, or does it again."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from support.rewriting_checks import Model, calls, fused

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

X = torch.randn(2, 4, 6, 3, generator=torch.Generator().manual_seed(0))

CANCELS = {
    "transposes": lambda m, x: F.gelu(x.transpose(1, 2).transpose(2, 1)),
    "permutations": lambda m, x: F.gelu(x.permute(0, 2, 3, 1).permute(0, 3, 1, 2)),
    "a transpose and a permutation": lambda m, x: F.gelu(x.transpose(-1, 2).permute(0, 1, 3, 2)),
    "turned matrices": lambda m, x: F.gelu(x.mT.mT),
    "moved axes": lambda m, x: F.gelu(x.movedim(1, -1).movedim(-1, 1)),
    "three permutations": lambda m, x: F.gelu(
        x.permute(1, 2, 3, 0).permute(1, 2, 3, 0).permute(2, 3, 0, 1)
    ),
    "permutations that copy": lambda m, x: F.gelu(
        x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).contiguous()
    ),
    "reshapes": lambda m, x: F.gelu(x.flatten(2).reshape(2, 4, 6, 3)),
    "an axis that comes and goes": lambda m, x: F.gelu(x.unsqueeze(1).squeeze(1)),
    "negations": lambda m, x: F.gelu(x.neg().neg()),
}


@pytest.mark.parametrize("name", CANCELS)
def test_both_go(name: str) -> None:
    assert calls(fused(CANCELS[name], X)) == {"gelu": 1}


def test_a_relu_of_a_relu_is_one() -> None:
    assert calls(fused(lambda m, x: F.relu(F.relu(x)) + 0.5, X)) == {"relu": 1, "add": 1}


def test_a_relu_of_what_is_not_negative_goes() -> None:
    assert calls(fused(lambda m, x: F.relu(F.relu6(x)) + 0.5, X)) == {"relu6": 1, "add": 1}
    assert calls(fused(lambda m, x: F.relu(x.sigmoid()) + 0.5, X)) == {"sigmoid": 1, "add": 1}
    assert calls(fused(lambda m, x: F.relu6(F.relu(x)) + 0.5, X)) == {
        "relu": 1,
        "relu6": 1,
        "add": 1,
    }


def negated(m: Model, x: Tensor) -> object:
    y = F.relu(x)
    z = -y
    y.add_(1)
    return F.gelu(-z) + y


def reshaped(m: Model, x: Tensor) -> object:
    y = F.relu(x).transpose(1, 2)
    z = y.reshape(2, 24, 3)  # a copy: what it was given is not contiguous
    y.add_(1)
    return F.gelu(z.reshape(2, 6, 4, 3)) + y


def copied(m: Model, x: Tensor) -> object:
    y = F.relu(x)
    z = y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    z.add_(1)
    return F.gelu(z) + y


@pytest.mark.parametrize("body", [negated, reshaped, copied])
def test_what_changes_in_place_in_between_or_afterwards_stays(body: object) -> None:
    assert "relu" in calls(fused(body, X, "cancelling"))  # type: ignore[arg-type]
    assert fused(body, X, "cancelling").plan.fusions == ()  # type: ignore[arg-type]


def test_a_copy_that_is_viewed_later_stays() -> None:
    def body(m: Model, x: Tensor) -> Tensor:
        y = F.relu(x).permute(0, 2, 3, 1)
        z = y.reshape(2, 6, 12).reshape(2, 6, 3, 4)  # contiguous, as `y` is not
        return F.gelu(z).view(2, -1)

    assert calls(fused(body, X))["reshape"] == 2


def test_what_is_read_in_between_stays() -> None:
    result = fused(lambda m, x: (F.gelu((y := x.transpose(1, 2)).transpose(1, 2)), F.relu(y)), X)
    assert calls(result)["gelu"] == 1
    assert "relu" in calls(result)


def test_other_permutations_stay() -> None:
    left = calls(fused(lambda m, x: F.gelu(x.permute(0, 2, 3, 1).permute(0, 2, 3, 1)), X))
    assert left["permute"] == 2
