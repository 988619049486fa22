"""The whole model before and after, on the same cases; what makes it differ is found by halving.

Rounding in the model's own dtype is enough. What differs by more is decided in float64, where a
right edit agrees to the last digits, unless the model amplifies even those: there an edit may move
the outputs as far as a hundred changes of the inputs by one unit in the last place do. What differs
by more than that is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from torchfuse.cases import Case
from torchfuse.isolation.snapshot import Snapshot
from torchfuse.verifying.equivalence import Equivalence, OutputDifference
from torchfuse.verifying.outputs import compare_outputs, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

__all__ = ["Trial", "Whole", "outputs_of", "prove", "widened"]

Match = TypeVar("Match")
_Match = TypeVar("_Match", contravariant=True)
Outputs = dict[str, Any]

# An edit rounds in every layer, and so may move outputs further than one rounding of the inputs.
_ROUNDINGS = 100.0


class Trial(Protocol[_Match]):
    """A model, in one dtype, that can be run with some of its matches fused."""

    def outputs(self, matches: Sequence[_Match], cases: Sequence[Case]) -> list[Outputs]:
        """What it returns on each case, fused by `matches`; none: as it was given."""


@dataclass(frozen=True)
class Whole(Generic[Match]):
    """What the comparison of the whole model came to."""

    check: Equivalence
    kept: list[Match]
    refused: list[Match]  # with it the model differs
    decided: bool  # False: it differs, and does not run in float64, where that would be told


def prove(
    trial: Trial[Match],
    matches: Sequence[Match],
    cases: Sequence[Case],
    expected: Sequence[Outputs],
    in_float64: Callable[[], Trial[Match]],
) -> Whole[Match]:
    """Which of the matches leave the model's outputs on `cases` as `expected`, and how far off.

    `in_float64` gives the same model there; it raises if there is none.
    """
    narrow = _Judge(trial, cases, dict(enumerate(expected)))
    wide: _Judge[Match] | None = None
    kept, refused = list(matches), list[Match]()
    decided = True
    while True:
        # In the model's own dtype first: float64 takes twice as long, or more.
        checks = narrow.checks(kept, range(len(cases)))
        open_ = [i for i, c in checks.items() if not c.passed or _is_blurred(expected[i])]
        if open_ and wide is None and decided:
            wide = _widened(in_float64, cases, open_)
            decided = wide is not None
        # In float64 a right fold agrees to the last digits, whatever the model amplifies in
        # float32.
        if wide is not None:
            exact = wide.explained(wide.checks(kept, open_))
        else:
            exact = narrow.explained({i: checks[i] for i in open_})
        wrong = [i for i, check in exact.items() if not check.passed]
        if not wrong or not kept:
            said = [c if c.passed and i not in wrong else exact[i] for i, c in checks.items()]
            outputs = tuple(output for check in said for output in check.outputs)
            return Whole(Equivalence(outputs), kept, refused, decided)
        kept, found = _halved(wide or narrow, kept, wrong)
        refused += found


class _Judge(Generic[Match]):
    """A trial, its cases, and what it returns on them unfused."""

    def __init__(
        self, trial: Trial[Match], cases: Sequence[Case], expected: dict[int, Outputs]
    ) -> None:
        self.trial, self.cases, self.expected = trial, cases, expected
        self.noise: dict[int, Equivalence] = {}

    def checks(self, matches: Sequence[Match], indices: Iterable[int]) -> dict[int, Equivalence]:
        """How far the outputs on these cases move when `matches` are fused."""
        indices = list(indices)
        try:
            for index in [i for i in indices if i not in self.expected]:
                (self.expected[index],) = self.trial.outputs([], [self.cases[index]])
            found = self.trial.outputs(matches, [self.cases[index] for index in indices])
        except Exception as error:  # noqa: BLE001 - the user's code fails where the original did not
            problem = f"the fused model fails: {type(error).__name__}: {error}"
            failed = Equivalence((OutputDifference("output", None, None, None, False, problem),))
            return dict.fromkeys(indices, failed)
        return {i: self._compared(i, actual) for i, actual in zip(indices, found, strict=True)}

    def explained(self, checks: dict[int, Equivalence]) -> dict[int, Equivalence]:
        """`checks`, in which what rounding of the inputs explains passes.

        A model may amplify the last digits of its inputs to any size (a deep one whose weights are
        random, a chaotic one): there a fixed tolerance would refuse what is right. How far it does
        is measured on the original, and only where it matters.
        """
        return {i: c if c.passed else _within(c, self._noise(i)) for i, c in checks.items()}

    def _noise(self, index: int) -> Equivalence:
        """How far its outputs move when each input moves to a next number of its dtype.

        Nothing is known of that where they move although no input does.
        """
        if index not in self.noise:
            case = self.cases[index]
            same, moved = self.trial.outputs([], [case, _nudged_case(case)])
            still = self._compared(index, same).max_abs == 0
            self.noise[index] = self._compared(index, moved) if still else Equivalence(())
        return self.noise[index]

    def _compared(self, index: int, actual: Outputs) -> Equivalence:
        """The differences; NaN and Inf must be where they were (masked scores)."""
        prefix = f"case {index + 1}: " if len(self.cases) > 1 else ""
        expected = self.expected[index]
        return Equivalence(
            tuple(compare_outputs(expected, actual, prefix=prefix, finite_only=True))
        )


def _widened(
    in_float64: Callable[[], Trial[Match]], cases: Sequence[Case], indices: Sequence[int]
) -> _Judge[Match] | None:
    """The same in float64; None if the model does not run like that (it insists on its dtype)."""
    try:
        trial = in_float64()
        wide = [Case(widened(c.args), widened(dict(c.kwargs)), c.method) for c in cases]
        exact = trial.outputs([], [wide[index] for index in indices])
    except Exception:  # noqa: BLE001
        return None
    return _Judge(trial, wide, dict(zip(indices, exact, strict=True)))


def _halved(
    judge: _Judge[Match], matches: list[Match], indices: Sequence[int]
) -> tuple[list[Match], list[Match]]:
    """The matches that agree on these cases, and those that do not, by halving."""
    kept, refused = list[Match](), list[Match]()

    def search(group: list[Match]) -> None:
        checks = judge.explained(judge.checks(kept + group, indices))
        if all(check.passed for check in checks.values()):
            kept.extend(group)
        elif len(group) > 1:
            # With those kept so far: two folds may only together be wrong.
            search(group[: len(group) // 2])
            search(group[len(group) // 2 :])
        else:
            refused.extend(group)

    search(matches)
    return kept, refused


def _within(check: Equivalence, noise: Equivalence) -> Equivalence:
    moved = {output.name: output.max_abs for output in noise.outputs}

    def passes(output: OutputDifference) -> bool:
        by = moved.get(output.name)
        if output.max_abs is None or by is None:
            return output.passed
        return output.passed or output.max_abs <= _ROUNDINGS * by

    return Equivalence(
        tuple(replace(o, passed=True, problem=None) if passes(o) else o for o in check.outputs)
    )


def outputs_of(model: nn.Module, cases: Sequence[Case], *, watch: bool) -> list[Outputs]:
    """What `model` returns on each case, from the same random state; nothing is left changed.

    But for what it writes to in place, if `watch` is not set.
    """
    snapshot = Snapshot(model, watch=watch)
    return [run(model, case, snapshot) for case in cases]


def _is_blurred(output: Outputs) -> bool:
    """Whether part of it is in a dtype whose rounding could hide a wrong fold."""
    half = (torch.float16, torch.bfloat16)
    return any(isinstance(leaf, Tensor) and leaf.dtype in half for leaf in output.values())


def widened(value: Any) -> Any:
    """`value` with its real numbers in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(widened(entry) for entry in value)
    if isinstance(value, dict):
        return {key: widened(entry) for key, entry in value.items()}
    return value


def _nudged_case(case: Case) -> Case:
    return Case(_nudged(case.args), _nudged(dict(case.kwargs)), case.method)


def _nudged(value: Any) -> Any:
    """Real numbers each replaced by the next larger or smaller one of their dtype."""
    generator = torch.Generator("cpu").manual_seed(0)

    def nudged(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            signs = torch.randn(value.shape, generator=generator, device="cpu").to(value)
            towards = torch.full_like(value, math.inf).copysign(signs)
            # (an infinite one, as in a mask, stays)
            return torch.where(value.isfinite(), torch.nextafter(value, towards), value)
        if isinstance(value, (list, tuple)):
            return type(value)(map(nudged, value))
        if isinstance(value, dict):
            return {key: nudged(entry) for key, entry in value.items()}
        return value

    return nudged(value)
