"""One number for a whole model, of which more is better: what max_drop is about."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchfuse.errors import InputError, first_line
from torchfuse.quantizing.calibration import sample_count
from torchfuse.quantizing.sensitivity import SignalToNoise
from torchfuse.verifying.outputs import copy_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torchfuse.cases import Case

__all__ = [
    "POINTS",
    "Measure",
    "Outputs",
    "measures",
    "name_of",
    "number_from",
    "outputs_of",
    "sqnr_of_outputs",
]

Outputs = list[list[Tensor]]  # per case, the tensors that the model returns

POINTS = 100.0


@dataclass(frozen=True)
class Measure:
    """A measure, as a function of a model and of what it returns on the calibration data."""

    name: str
    of: Callable[[nn.Module, Outputs], float]
    samples: int | None = None  # that it is a share of, in percent; None: it is the user's own


def measures(
    data: Sequence[Case],
    expected: Outputs,
    labels: Any,
    evaluate: Callable[[nn.Module], float] | None,
) -> list[Measure]:
    """Return the measures that there are, the one that was asked for most plainly first.

    These are the user's own, top-1 with `labels`, and agreement with the classes that the float
    model gives, `expected`; the latter for models that return one tensor of scores.

    Raises:
        InputError: labels that do not fit.
    """
    found = []
    if evaluate is not None:
        found.append(_evaluation(evaluate))
    if labels is not None:
        found.append(_top_1(labels, list(data), expected))
    if _are_scores(expected):
        wanted = _classes(expected)
        found.append(_same_as("agreement", wanted))
    return found


def _evaluation(evaluate: Callable[[nn.Module], float]) -> Measure:
    def measured(model: nn.Module, _: Outputs) -> float:
        returns = "a number of which more is better"
        number = number_from(evaluate, model, takes="the model", returns=returns)
        if not math.isfinite(number):
            raise InputError(
                f"Expected {name_of(evaluate)} to return a finite number, got {number}."
            )
        return number

    return Measure(name_of(evaluate), measured)


def name_of(evaluate: Callable[..., Any]) -> str:
    """Return what reports call a user's function."""
    return getattr(evaluate, "__name__", type(evaluate).__name__)


def number_from(evaluate: Callable[[Any], Any], subject: Any, *, takes: str, returns: str) -> float:
    """Return what a user's function says of `subject`; `takes` and `returns` in words.

    Raises:
        InputError: it raises, or returns no number.
    """
    name = name_of(evaluate)
    try:
        value = evaluate(subject)
    except Exception as error:
        raise InputError(
            f"{name} ended in {type(error).__name__}: {first_line(error)}. It is called with "
            f"{takes}, and returns {returns}."
        ) from error
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"Expected {name} to return {returns}, got {type(value).__name__}."
        ) from error


def _top_1(labels: Any, data: list[Case], expected: Outputs) -> Measure:
    if not _are_scores(expected):
        raise InputError(
            "Labels are for a model that returns one tensor of scores, [samples, classes]; give "
            "evaluate, a function of the model, instead."
        )
    samples, classes = sample_count(data), expected[0][0].shape[1]
    try:
        wanted = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"Expected labels as integers, got {type(labels).__name__}.") from error
    if wanted.is_floating_point() or wanted.is_complex() or wanted.shape != (samples,):
        raise InputError(
            f"Expected an integer label for each of the {samples} calibration samples, got "
            f"{'×'.join(map(str, wanted.shape)) or 'one'} of {wanted.dtype}."
        )
    if len(wanted) and not (int(wanted.min()) >= 0 and int(wanted.max()) < classes):
        raise InputError(
            f"Expected labels of 0 to {classes - 1}, since the model tells {classes} classes "
            f"apart, got {int(wanted.min())} to {int(wanted.max())}."
        )
    return _same_as("top-1", wanted)


def _same_as(name: str, wanted: Tensor) -> Measure:
    return Measure(name, lambda _, outputs: _share(_classes(outputs), wanted), len(wanted))


def outputs_of(model: nn.Module, data: Sequence[Case]) -> Outputs:
    """Return what `model` returns for each case, its tensors in a row."""
    found = []
    with torch.no_grad():
        for case in data:
            args, kwargs = copy_tensors((case.args, dict(case.kwargs)))
            leaves = pytree.tree_leaves(model(*args, **kwargs))
            found.append([leaf for leaf in leaves if isinstance(leaf, Tensor)])
    return found


def sqnr_of_outputs(expected: Outputs, got: Outputs) -> float:
    """Return the signal-to-noise ratio over all cases, in dB."""
    found = SignalToNoise()
    for a_case, b_case in zip(expected, got, strict=True):
        for a, b in zip(a_case, b_case, strict=True):
            if a.is_floating_point():
                found.take(a, b)
    return found.sqnr_db


def _are_scores(outputs: Outputs) -> bool:
    return all(
        len(case) == 1
        and case[0].dim() == 2
        and case[0].shape[1] > 1
        and case[0].is_floating_point()
        for case in outputs
    )


def _classes(outputs: Outputs) -> Tensor:
    return torch.cat([case[0].argmax(1) for case in outputs])


def _share(a: Tensor, b: Tensor) -> float:
    return POINTS * float((a == b).double().mean())
