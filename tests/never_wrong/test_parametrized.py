"""Weights that are computed from others stay right."""

import pytest
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import torchfuse
from support.fusing_checks import (
    IMAGE,
    ROW,
    ConvBn,
    assert_fuses,
    assert_skipped,
    check,
    trained,
)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrized_conv_stays_right(wrap: object) -> None:
    check(trained(ConvBn(wrap(nn.Conv2d(4, 4, 3))), IMAGE), IMAGE)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_conv_with_the_old_weight_norm_or_spectral_norm_stays_right(wrap: object) -> None:
    # The old ones recompute the weight in a pre-hook: a folded weight would be overwritten.
    check(trained(ConvBn(wrap(nn.Conv2d(4, 4, 3))), IMAGE), IMAGE)


class ReadsTheComputedWeight(ConvBn):
    """The parameters behind the weight are read inside the conv both times, also for the sum."""

    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv.weight.sum()


def test_a_computed_weight_that_something_else_reads_is_skipped() -> None:
    model = ReadsTheComputedWeight(parametrizations.weight_norm(nn.Conv2d(4, 4, 3)))
    check(trained(model, IMAGE), IMAGE)
    (skip,) = torchfuse.plan(model, IMAGE).skips
    assert "is also read outside of its calls" in skip.reason


def test_a_conv_with_a_computed_weight_that_is_called_apart_as_well_is_skipped() -> None:
    """Each call computes a weight of its own, so no two calls read the same one."""

    class CalledTwice(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) + self.conv(x).mean()

    model = CalledTwice(parametrizations.weight_norm(nn.Conv2d(4, 4, 3)))
    assert_skipped(trained(model, IMAGE), IMAGE, because="called more than once")


def test_a_parametrization_that_looks_at_its_own_result_is_baked_in() -> None:
    linear = parametrizations.orthogonal(nn.Linear(5, 3))
    assert_fuses(trained(ConvBn(linear, nn.BatchNorm1d(3)), ROW), ROW)


def test_a_pruned_conv_is_skipped_and_says_how_to_make_it_permanent() -> None:
    model = ConvBn()
    prune.random_unstructured(model.conv, "weight", 0.5)
    model = trained(model, IMAGE)
    (skip,) = assert_skipped(model, IMAGE, because="pruned").plan.skips
    assert "prune.remove" in skip.hint
    prune.remove(model.conv, "weight")
    assert_fuses(model, IMAGE)
