"""Each fusion in an exported program by itself: what is rounding, and what is a wrong fold."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.export import export

import torchfuse
from support.fusing_checks import IMAGE, ConvBn, trained
from torchfuse.fusing.programs import program_judging
from torchfuse.fusing.programs.program_proving import pair_differences, whole_difference
from torchfuse.rules import RULES

# torch.export deep-copies its own pytree specs when it makes a module of a program.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

Plant = Callable[[float], None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """What makes every fold of a batch norm into a convolution relatively this much too large."""
    (rule,) = [rule for rule in RULES if rule.name == "conv_bn"]

    def planted(off: float) -> None:
        def rewrite(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
            weight, bias = rule.rewrite(layer, norm)
            return weight * (1 + off), bias * (1 + off)

        rules = tuple(replace(r, rewrite=rewrite) if r is rule else r for r in RULES)
        monkeypatch.setattr(program_judging, "RULES", rules)

    return planted


def refused(model: nn.Module, inputs: Tensor) -> list[str]:
    """The batch norms whose folds by themselves did not pass."""
    torch.manual_seed(0)
    plan = torchfuse.fuse_exported(export(model, (inputs,))).plan
    return [s.modules[-1] for s in plan.skips if "the folded layer is off by" in s.reason]


@pytest.mark.parametrize(
    ("dtype", "off", "right"),
    [
        (torch.float32, 0.9e-4, True),
        (torch.float32, 1.1e-4, False),
        (torch.float64, 0.9e-10, True),
        (torch.float64, 1.1e-10, False),
        # not rounding, whatever the dtype rounds to: float64 tells
        (torch.bfloat16, 1e-2, False),
        (torch.float16, 1e-2, False),
    ],
)
def test_a_batch_norm_may_round_by_1e_4_in_float32_and_by_1e_10_in_float64(
    dtype: torch.dtype, off: float, right: bool, plant: Plant
) -> None:
    torch.manual_seed(0)
    model = trained(ConvBn(), IMAGE).to(dtype)
    plant(off)
    assert refused(model, IMAGE.to(dtype)) == ([] if right else ["bn"])


class InHalf(ConvBn):
    """Reads the bits of its output, which are not of that many in float64."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if x.dtype.itemsize != 2:
            return x
        bits = x.view(torch.int16)
        return (bits ^ torch.zeros((2, 4, 8, 8), dtype=torch.int16)).view(x.dtype)


@pytest.mark.parametrize(
    ("dtype", "off", "right"),
    [
        (torch.float16, 2.5e-3, True),
        (torch.float16, 8e-3, False),
        (torch.bfloat16, 1.6e-2, True),
        (torch.bfloat16, 5e-2, False),
    ],
)
def test_where_a_program_in_half_precision_does_not_run_in_float64_a_tolerance_decides(
    dtype: torch.dtype, off: float, right: bool, plant: Plant
) -> None:
    torch.manual_seed(0)
    model = trained(InHalf(), IMAGE).to(dtype)
    plant(off)
    assert refused(model, IMAGE.to(dtype)) == ([] if right else ["bn"])


class Mapped(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        return torch.vmap(super().forward)(x[None])[0]


def test_a_wrong_fold_inside_vmap_is_refused_by_itself(plant: Plant) -> None:
    torch.manual_seed(0)
    model = trained(Mapped(), IMAGE)
    plant(0.01)
    assert refused(model, IMAGE) == ["bn"]


def test_the_whole_is_compared_with_the_given_program_itself() -> None:
    given, other = export(nn.ReLU(), (IMAGE,)), export(nn.Tanh(), (IMAGE,))
    whole = whole_difference(given, ["bn"], lambda _: other, lambda: (given, lambda _: other))
    assert (whole.kept, whole.refused, whole.check.passed) == ([], ["bn"], True)


def test_of_no_pairs_nothing_is_run() -> None:
    program = copy.copy(export(nn.ReLU(), (IMAGE,)))
    program._example_inputs = None  # it could not

    def in_float64() -> None:
        raise AssertionError("float64 was asked for")

    assert pair_differences(program, program, {}, in_float64) == {}
