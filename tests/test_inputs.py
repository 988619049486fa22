"""What verbs are given is looked at first: weights that are no numbers are named."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchfuse
from fusing_checks import IMAGE, ConvBn, trained
from torchfuse.errors import InputError
from torchfuse.inputs import require_finite_tensors

VERBS: dict[str, Callable[[nn.Module], object]] = {
    "plan": lambda model: torchfuse.plan(model, IMAGE),
    "fuse": lambda model: torchfuse.fuse(model, IMAGE),
    "fuse, not verified": lambda model: torchfuse.fuse(model, IMAGE, verify=False),
    "fuse in place": lambda model: torchfuse.fuse(model, IMAGE, inplace=True),
    "fuse_exported": lambda model: torchfuse.fuse_exported(torch.export.export(model, (IMAGE,))),
    "fuse_modules": lambda model: torchfuse.fuse_modules(
        model, ["conv", "bn"], example_inputs=IMAGE
    ),
    "fuse_modules_qat": lambda model: torchfuse.fuse_modules_qat(
        model.train(), ["conv", "bn"], example_inputs=IMAGE
    ),
    "verify": lambda model: torchfuse.verify(model, model, IMAGE),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_weight_that_is_not_a_number_is_named(verb: str) -> None:
    model = trained(ConvBn(), IMAGE)
    model.conv.weight.data[1, 2, 0, 0] = float("nan")
    with pytest.raises(InputError) as error:
        VERBS[verb](model)
    assert str(error.value) == (
        "Expected finite weights, but 'conv.weight' has NaN in 1 of its 144 values; load a "
        "checkpoint without NaN, or look for an overflow in training."
    )


@pytest.mark.parametrize("verb", VERBS)
def test_infinite_statistics_are_named(verb: str) -> None:
    model = trained(ConvBn(), IMAGE)
    model.bn.running_mean[:2] = float("inf")
    with pytest.raises(InputError, match=r"'bn\.running_mean' has Inf in 2 of its 4 values; load"):
        VERBS[verb](model)


class Masked(nn.Module):
    """Scores of which an infinite mask leaves the first two, and a value that is not set yet."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = ConvBn()
        self.mask = nn.Parameter(torch.tensor([0, 0] + [-float("inf")] * 6), requires_grad=False)
        self.register_buffer("also", self.mask.detach().clone())
        self.register_buffer("unset", torch.tensor(float("nan")))

    def forward(self, x: Tensor) -> Tensor:
        return (self.pair(x) + self.mask + self.also).softmax(-1)


@pytest.mark.parametrize("verb", ["plan", "fuse", "fuse_exported", "verify"])
def test_what_may_be_infinite_or_unset_is_no_obstacle(verb: str) -> None:
    result = VERBS[verb](trained(Masked(), IMAGE))
    if verb.startswith("fuse"):
        assert len(result.plan.fusions) == 1
        assert result.check.passed


def test_large_weights_are_finite_although_their_sum_is_not() -> None:
    model = nn.Linear(4, 4).half()
    model.weight.data.fill_(6e4)
    require_finite_tensors(model)


def test_tensors_without_values_are_not_looked_at() -> None:
    with torch.device("meta"):
        model = ConvBn()
    model.conv.weight.data = model.conv.weight.data.to(torch.float8_e4m3fn)
    require_finite_tensors(model)


def test_a_nan_in_what_verify_does_not_use_is_no_obstacle() -> None:
    model = trained(ConvBn(), IMAGE)
    model.unused = nn.Linear(1, 1)
    model.unused.weight.data.fill_(float("nan"))
    assert torchfuse.verify(model, model, IMAGE).passed
