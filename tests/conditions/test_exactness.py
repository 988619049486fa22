"""Where modules cannot be edited and calls could be rewritten, the skip says so, and it is true."""

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
