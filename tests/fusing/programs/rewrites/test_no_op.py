"""Calls that do nothing are removed, so that what they stand between can be merged."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.rewriting_checks import Model, calls, fused

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))

DOES_NOTHING = {
    "dropout": lambda m, x: F.relu(m.drop(x)),
    "dropout of nothing": lambda m, x: F.relu(F.dropout(x, 0.0, training=True)),
    "adding 0": lambda m, x: F.relu(0 + x - 0),
    "times 1": lambda m, x: F.relu(1 * x / 1),
    "the same dtype": lambda m, x: F.relu(x.to(x.dtype)),
    "the same shape": lambda m, x: F.relu(x.reshape(2, 4, 6)),
    "a copy": lambda m, x: F.relu(x.clone()),
    "a size that it has": lambda m, x: F.relu(x.expand_as(x)),
    "all of it": lambda m, x: F.relu(x[:]),
    "one alone side by side": lambda m, x: F.relu(torch.cat([x], 1)),
    "adding zeros": lambda m, x: F.relu(torch.zeros_like(x) + x),
    "an identity": lambda m, x: F.relu(m.same(x)),
}


@pytest.mark.parametrize("name", DOES_NOTHING)
def test_it_is_removed(name: str) -> None:
    result = fused(DOES_NOTHING[name], X, drop=nn.Dropout(), same=nn.Identity())
    assert calls(result) == {"relu": 1}


def test_a_parameter_that_is_passed_on_is_kept() -> None:
    """As a class token is, expanded to a batch of one."""
    model = nn.Linear(6, 4)
    result = fused(lambda m, x: torch.cat([m.token.weight[None].expand(1, -1, -1), x[:1]]), X,
                   token=model)  # fmt: skip
    assert "expand" not in calls(result)
    assert "token.weight" in result.model.state_dict


def copied_and_changed(m: Model, x: Tensor) -> object:
    y = F.relu(x)
    z = y.clone()
    z.add_(x)
    return y + z


def passed_on_and_changed(m: Model, x: Tensor) -> object:
    y = F.relu(x) + 0
    y.mul_(2)
    return y


def changed_input(m: Model, x: Tensor) -> object:
    y = x + 0
    y.relu_()
    return y + x


def zeros_that_are_changed(m: Model, x: Tensor) -> object:
    zeros = torch.zeros_like(x)
    y = x + zeros[:]
    zeros.add_(x)
    return F.relu(y) + zeros


def test_zeros_that_are_changed_in_place_stay() -> None:
    assert "zeros_like" in calls(fused(zeros_that_are_changed, X))


def test_a_copy_that_is_changed_in_place_stays() -> None:
    assert "clone" in calls(fused(copied_and_changed, X))
    assert calls(fused(changed_input, X))["add"] == 2


def test_a_copy_that_nobody_else_looks_at_is_removed() -> None:
    assert "add" not in calls(fused(passed_on_and_changed, X))


def test_what_changes_something_stays() -> None:
    result = fused(lambda m, x: F.relu(x.to(torch.float16).to(x.dtype) + 0.5).reshape(4, 12), X)
    assert result.plan.fusions == ()
