"""Functional calls are neither ignored nor mistaken for modules.

The numbers are upstream issues: pt is pytorch/pytorch, ao pytorch/ao.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchfuse
from support.fusing_checks import IMAGE, ConvBn, assert_same, check, check_not_folded, trained
from torchfuse.fusing import module_proving
from torchfuse.fusing.module_edits import folded_layer


def test_a_functional_batch_norm_is_not_ignored_pt122070() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            bn = self.bn
            y = self.conv(x)
            return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False)

    result = check(trained(Model(), IMAGE), IMAGE)
    assert result.plan.fusions or result.plan.skips, "not even mentioned"


def test_a_functional_conv_is_not_ignored() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 3, 3) * 0.1)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(F.conv2d(x, self.weight, padding=1))

    result = check(trained(Model(), IMAGE), IMAGE)
    assert result.plan.fusions or result.plan.skips, "not even mentioned"


def test_a_functional_conv_whose_weight_is_computed_stays_right() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(F.conv2d(x, self.conv.weight * 2 + 0.1))

    check_not_folded(Model())


def test_a_dynamic_conv_whose_weight_depends_on_the_input_stays_right() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(F.conv2d(x, self.conv.weight * x.mean().sigmoid()))

    check_not_folded(Model())


class Transformed(ConvBn):
    """The pair as torch.func transforms it, and a pair that nothing transforms."""

    def __init__(self, transformed: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.transformed = transformed

    def forward(self, x: Tensor) -> Tensor:
        if self.training:  # running statistics cannot be updated inside most transforms
            return self.block(super().forward(x))
        return self.transformed(self.block, super().forward(x))


TRANSFORMS = {  # how often it fuses
    "vmap": (2, lambda block, x: torch.vmap(block)(x[None])[0]),
    "vmap over samples": (2, lambda block, x: torch.vmap(lambda y: block(y[None])[0])(x)),
    "vmap in vmap": (2, lambda block, x: torch.vmap(torch.vmap(block))(x[None, None])[0, 0]),
    "functional_call": (
        2,
        lambda block, x: torch.func.functional_call(block, dict(block.named_parameters()), (x,)),
    ),
    "functional_call with other weights": (
        1,
        lambda block, x: torch.func.functional_call(
            block, {name: p * 2 for name, p in block.named_parameters()}, (x,)
        ),
    ),
    "grad": (1, lambda block, x: torch.func.grad(lambda y: block(y).square().sum())(x)),
    "vjp": (2, lambda block, x: torch.func.vjp(block, x)[0]),
    "jvp": (2, lambda block, x: torch.func.jvp(block, (x,), (x.sin(),))[1]),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch.func.jvp's own
@pytest.mark.parametrize("keep", [True, False], ids=["originals kept", "not kept"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_torch_func_transforms_is_fused_or_skipped(name: str, keep: bool) -> None:
    times, transformed = TRANSFORMS[name]
    model = trained(Transformed(transformed), IMAGE)
    result = torchfuse.fuse(model, IMAGE, keep_originals=keep)
    assert len(result.plan.fusions) == times, str(result.plan)
    assert result.check.passed
    assert_same(model(IMAGE).detach(), result.model(IMAGE).detach())


def test_a_wrong_fold_inside_vmap_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(Transformed(TRANSFORMS["vmap over samples"][1]), IMAGE)
    monkeypatch.setattr(
        module_proving,
        "folded_layer",
        lambda layer, w, b, child: folded_layer(layer, w * 1.01, b, child),
    )
    assert torchfuse.fuse(model, IMAGE).plan.fusions == ()
