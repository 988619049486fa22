"""The verdicts on one model: each pair fused or skipped, and the model's outputs in float64."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import torchfuse
from torchfuse.cases import Case, cases
from torchfuse.verifying.outputs import run

# In float64 a right fold changes the last digits, and the deepest of these models amplify that to
# 5e-11. A wrong one changes the first digits.
AGREEMENT = 1e-9
DIFFERENT = 1e-5  # the table's digits, and what another processor's rounding does to the statistics


@dataclass(frozen=True)
class Digest:
    """A few numbers that stand for all of a model's outputs."""

    values: int
    numbers: tuple[float, float, float]  # the norm, and projections on two fixed directions

    def agrees(self, other: "Digest") -> bool:
        """Return whether both are of the same outputs, as far as six digits tell."""
        near = max(self.numbers[0], other.numbers[0]) * DIFFERENT
        pairs = zip(self.numbers, other.numbers, strict=True)
        return self.values == other.values and all(abs(a - b) <= near for a, b in pairs)


@dataclass(frozen=True)
class Verdicts:
    """One model of the table."""

    name: str
    inputs: str  # the calls it was fused with: "forward(1×3×64×64)"
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()  # rule, modules
    skipped: tuple[tuple[str, ...], ...] = ()  # modules
    proved: bool = True  # whether the proof had its say, as it has by default
    raised: str = ""  # the error's class, and how it begins
    output: Digest | None = None
    no_output: str = ""  # why there is none
    wrong: str = ""  # how the fused model differs from the original; never in the table


def verdicts_of(
    name: str,
    model: nn.Module,
    inputs: Any,
    *,
    rules: Any = None,
    proved: bool = True,
    in_float64: Callable[[nn.Module], nn.Module] | None = None,
) -> Verdicts:
    """Return what a user of `torchfuse.fuse(model, inputs)` gets; if not `proved`, without proof.

    The outputs are those of `in_float64(model)`, by default a converted copy, which is fused by
    the conditions alone and must compute what it computed.
    """
    try:
        listed = cases(inputs)
        called = "; ".join(map(str, listed))
        plan = torchfuse.fuse(model, inputs, rules=rules, verify=proved).plan
    except Exception as error:  # noqa: BLE001  # whatever it is, it is what the user gets
        return Verdicts(name, "", proved=proved, raised=_beginning(error))
    fused = tuple((fusion.rule, fusion.modules) for fusion in plan.fusions)
    skipped = tuple(skip.modules for skip in plan.skips)
    if not fused and not skipped:
        return Verdicts(name, called, proved=proved, no_output="no pair")
    with torch.inference_mode(False):  # in which a test may be, and copies could not be trained
        try:
            wide = (in_float64 or _in_float64)(model)
            wide_cases = [_case_in_float64(case) for case in listed]
            expected = [_tensors(run(wide, case)) for case in wide_cases]
        except Exception as error:  # noqa: BLE001  # the model insists on its dtype, or on being one
            reason = f"not in float64: {type(error).__name__}"
            return Verdicts(name, called, fused, skipped, proved, no_output=reason)
        output = digest([tensor for outputs in expected for tensor in outputs.values()])
        wrong = _difference(wide, wide_cases, expected, rules)
    return Verdicts(name, called, fused, skipped, proved, output=output, wrong=wrong)


def digest(tensors: list[Tensor]) -> Digest:
    """Return norm and projections of the values of all `tensors`, in order; NaN and Inf are 0.

    The directions are cosines, which are the same with every version of torch.
    """
    # The device is named because the tests try others as the default.
    nothing = torch.zeros(0, dtype=torch.float64, device="cpu")
    flat = torch.cat([nothing, *(tensor.flatten().double() for tensor in tensors)])
    flat = flat.nan_to_num(0.0, 0.0, 0.0)
    index = torch.arange(len(flat), dtype=torch.float64, device="cpu")
    directions = [torch.cos(index * step + 1) for step in (math.sqrt(2), math.sqrt(3))]
    projections = [(flat @ direction).item() for direction in directions]
    return Digest(len(flat), (flat.norm().item(), projections[0], projections[1]))


def _difference(
    wide: nn.Module, wide_cases: list[Case], expected: list[dict[str, Tensor]], rules: Any
) -> str:
    """Return how the outputs of `wide` differ once it is fused; "" if only in the last digits."""
    try:
        result = torchfuse.fuse(wide, wide_cases, rules=rules, verify=False)
        if not result.plan.fusions:
            return ""  # a model that changes with each pass need not repeat itself
        actual = [_tensors(run(result.model, case)) for case in wide_cases]
    except Exception as error:  # noqa: BLE001  # the original ran
        return f"in float64 fusing or the fused model raises {_beginning(error)}"
    for before, after in zip(expected, actual, strict=True):
        if before.keys() != after.keys():
            return f"returns {sorted(after)} instead of {sorted(before)}"
        for key, tensor in before.items():
            difference = _relative(tensor, after[key])
            if difference > AGREEMENT:
                return f"{key} differs by {difference:.1e} in float64"
    return ""


def _relative(a: Tensor, b: Tensor) -> float:
    """Return max|a − b| / max|a|; inf if shape, dtype, or where values are not finite differ."""
    if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a.isfinite(), b.isfinite()):
        return math.inf
    if not a.numel():
        return 0.0
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = (tensor.to(wide).nan_to_num(0.0, 0.0, 0.0) for tensor in (a, b))
    return ((a - b).abs().max() / a.abs().max().clamp(min=1e-12)).item()


def _in_float64(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def _case_in_float64(case: Case) -> Case:
    return Case(_widened(case.args), _widened(dict(case.kwargs)), case.method)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if type(value) in (list, tuple):
        return type(value)(map(_widened, value))
    if isinstance(value, Mapping):
        return {key: _widened(entry) for key, entry in value.items()}
    return value


def _tensors(outputs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in outputs.items() if isinstance(leaf, Tensor)}


def _beginning(error: Exception) -> str:
    words = " ".join(str(error).split()[:6])
    return f"{type(error).__name__}: {words}"
