"""Where modules cannot be edited and calls could be rewritten, the skip says so, and it is true."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchfuse
from support.fusing_checks import IMAGE, ConvBn, trained
from torchfuse.planning import FusionResult


class CalledApart(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv(x)


class TiedWeight(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight, padding=1)


class AFunction(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(x, self.conv.weight, self.conv.bias))


class Renames(ConvBn):
    def __init__(self) -> None:
        super().__init__()
        self.bn._register_state_dict_hook(lambda *_: None)


class AlsoTheOutput(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class TiedAndOutput(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y + F.conv2d(x, self.conv.weight, padding=1)


def by_rewriting(model: nn.Module) -> FusionResult:
    return torchfuse.fuse_exported(torch.export.export(model, (IMAGE,)))


@pytest.mark.parametrize("model", [CalledApart, TiedWeight, AFunction, Renames])
def test_a_skip_that_rewriting_can_do_says_so(model: type[ConvBn]) -> None:
    made = trained(model(), IMAGE)
    (skip,) = (s for s in torchfuse.plan(made, IMAGE).skips if s.rule != "branches")
    assert "torchfuse.fuse_exported" in skip.hint
    assert [f.rule for f in by_rewriting(made).plan.fusions].count("conv_bn") == 1


@pytest.mark.parametrize("model", [AlsoTheOutput, TiedAndOutput])
def test_a_skip_that_rewriting_cannot_do_either_does_not(model: type[ConvBn]) -> None:
    made = trained(model(), IMAGE)
    (skip,) = (s for s in torchfuse.plan(made, IMAGE).skips if s.rule != "branches")
    assert "fuse_exported" not in skip.hint
    assert by_rewriting(made).plan.fusions == ()


def test_training_mode_is_no_matter_of_modules() -> None:
    model = trained(ConvBn(), IMAGE)
    model.bn.train()
    (skip,) = torchfuse.plan(model, IMAGE).skips
    assert skip.hint == "Call model.eval() first."


class WorksInAThreadBetween(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(y.sum).result()  # nobody sees what it reads
        return self.bn(y)


class RoundsBetween(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).to(torch.bfloat16).to(torch.float32))


class NormalisesRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(x[:, 0]))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            WorksInAThreadBetween(),
            "The model hands work to another thread, where it cannot be seen what is read.",
        ),
        (
            RoundsBetween(),
            "What `conv` computes in float32 is rounded to bfloat16 before `bn`.",
        ),
        (
            NormalisesRows(),
            "`bn` normalises axis 1 of its input, which is not the channel axis (2) of the 3-D "
            "output of `linear` element by element.",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_happens_between_a_layer_and_its_norm_is_said_where_it_is_in_the_way(
    model: nn.Module, reason: str
) -> None:
    plan = torchfuse.plan(trained(model, IMAGE), IMAGE)
    assert plan.fusions == ()
    assert [skip.reason for skip in plan.skips] == [reason]
