"""Winning back accuracy after static int8, in order of cost, each step measured and undone if vain.

What a step fits to the data it was given says little of other data, so where there is enough, a
quarter is held out: steps are fitted to the rest, and kept by what they gain on that quarter. What
was kept is then fitted to all of it.

1. careful_ranges: nothing that was seen is cut off, and scores stay in float (`static.py`). The
   other steps begin with it, since they correct what is rounded, and what is cut off misleads them:
   whether it stays is decided after them.
2. equalization: factors per channel that change nothing in float (`equalization.py`).
3. bias_correction: the shift that int8 puts on each channel's mean, taken back (`rounding.py`).
4. rounding: weights rounded so that each layer's output stays, which includes step 3.
5. with `max_drop`: the layers that lose most stay in float, one more at a time.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from torchfuse.errors import InputError
from torchfuse.quantizing import static
from torchfuse.quantizing.calibration import calibrate, sample_count
from torchfuse.quantizing.equalization import equalize
from torchfuse.quantizing.metrics import (
    POINTS,
    Measure,
    Outputs,
    measures,
    outputs_of,
    sqnr_of_outputs,
)
from torchfuse.quantizing.quantization_report import Accuracy, LayerError, MaxDrop, RecoveryStep
from torchfuse.quantizing.rounding import correct
from torchfuse.quantizing.sensitivity import errors_by_node, layer_errors
from torchfuse.stats import share_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import fx, nn

    from torchfuse.cases import Case

_T = TypeVar("_T")

__all__ = ["STEPS", "Recovered", "measured", "recovered"]

STEPS = ("careful_ranges", "equalization", "bias_correction", "rounding")
# Layers are kept in float a few at a time: this share of them, at least one.
_SHARE_KEPT = 0.05
_SHOWN = 8  # names in a note
# From so many cases on, one in four stretches of them, of sixteen, is held out to judge the steps.
_LEAST_CASES, _STRETCHES, _ONE_OF = 32, 16, 4
# Layers are corrected and blamed, and steps measured, on so many cases, spread over the data. While
# layers are corrected, what is still to be read in all these cases is in memory, of both graphs.
_MOST_CASES = 128


@dataclass
class Recovered:
    """An int8 graph, and what was measured on the way to it."""

    model: fx.GraphModule
    late_growth: float | None
    sqnr_db: float | None = None
    layers: tuple[LayerError, ...] = ()
    steps: tuple[RecoveryStep, ...] = ()
    accuracy: tuple[Accuracy, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    max_drop: MaxDrop | None = None


def recovered(
    graph: fx.GraphModule,
    data: list[Case],
    *,
    steps: Sequence[str],
    max_drop: float | None,
    labels: Any,
    evaluate: Callable[[nn.Module], float] | None,
    explain: bool,
    progress: Callable[[str], object] = lambda _: None,
) -> Recovered:
    """Return `graph` in int8 with the steps that help; its measures are on `data`."""
    expected = outputs_of(graph, data)
    wanted = measures(data, expected, labels, evaluate)
    if max_drop is not None and not wanted:
        raise InputError(
            "max_drop is about a measure, and this model returns no scores of classes; give "
            "evaluate, a function that takes a model and returns a number."
        )
    before = [measure.of(graph, expected) for measure in wanted]
    work = _Work(graph, data, expected, hold_out=bool(steps), progress=progress)
    work.try_steps(steps)
    work.fit_to_all()
    growth = work.late_growth
    kept = None if max_drop is None else work.keep_float(wanted[0], before[0], max_drop)
    progress("measuring what was lost")
    outputs = outputs_of(work.int8, data)
    if explain:
        progress("measuring the error of each layer")
    return Recovered(
        model=work.int8,
        late_growth=growth,
        sqnr_db=sqnr_of_outputs(expected, outputs),
        layers=layer_errors(work.int8, work.reference, work.some) if explain else (),
        steps=tuple(work.steps),
        accuracy=_accuracy(wanted, before, work.int8, outputs),
        notes=tuple(work.notes),
        warnings=tuple(work.warnings),
        max_drop=kept,
    )


def measured(
    model: fx.GraphModule,
    reference: fx.GraphModule,
    data: list[Case],
    labels: Any,
    evaluate: Callable[[nn.Module], float] | None,
    explain: bool,
) -> Recovered:
    """Return a quantized graph as it is, with its measures on `data`."""
    expected, outputs = outputs_of(reference, data), outputs_of(model, data)
    wanted = measures(data, expected, labels, evaluate)
    before = [measure.of(reference, expected) for measure in wanted]
    return Recovered(
        model=model,
        late_growth=None,
        sqnr_db=sqnr_of_outputs(expected, outputs),
        layers=layer_errors(model, reference, _spread(data)) if explain else (),
        accuracy=_accuracy(wanted, before, model, outputs),
    )


def _accuracy(
    wanted: list[Measure], before: list[float], model: nn.Module, outputs: Outputs
) -> tuple[Accuracy, ...]:
    return tuple(
        _beside(measure, was, measure.of(model, outputs))
        for measure, was in zip(wanted, before, strict=True)
    )


def _beside(measure: Measure, before: float, after: float) -> Accuracy:
    if measure.samples is None:
        return Accuracy(measure.name, before, after)
    share = share_of(round(after / POINTS * measure.samples), measure.samples)
    assert share.low is not None
    assert share.high is not None
    low, high = POINTS * share.low, POINTS * share.high
    return Accuracy(
        measure.name, before, after, samples=measure.samples, after_low=low, after_high=high
    )


def _spread(data: list[_T]) -> list[_T]:
    """No more cases than layers are looked at on, evenly from all of them."""
    return data[:: -(-len(data) // _MOST_CASES)]


def _held_out(data: list[_T]) -> tuple[list[_T], list[_T]]:
    """What steps are fitted to, and what they are judged by; the same if there is little data.

    The latter is four stretches: neighbours are often alike (views of a photo, frames of a film),
    and an end may be unlike the rest (sorted by class).
    """
    if len(data) < _LEAST_CASES:
        return data, data
    parts: tuple[list[_T], list[_T]] = ([], [])
    for number, case in enumerate(data):
        stretch = number * _STRETCHES // len(data)
        parts[stretch % _ONE_OF == _ONE_OF - 1].append(case)
    return parts


@dataclass(frozen=True)
class _Settings:
    """How an int8 graph is made."""

    reference: fx.GraphModule  # of the same layers in float
    careful: bool = False
    corrected: bool | None = None  # None: not; False: biases; True: weights too


class _Work:
    """The best int8 graph so far, and what it is judged by."""

    def __init__(
        self,
        graph: fx.GraphModule,
        data: list[Case],
        expected: Outputs,
        *,
        hold_out: bool,
        progress: Callable[[str], object],
    ) -> None:
        self.data = data
        self.progress = progress
        self.fitted, judged = _held_out(data) if hold_out else (data, data)
        self.judged = _spread(judged)
        self.expected = _spread(_held_out(expected)[1] if hold_out else expected)
        self.kept_float: list[str] = []
        self.steps: list[RecoveryStep] = []
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.late_growth: float | None = None
        self.settings = self.plain = _Settings(graph)
        self.int8 = self._quantized(self.settings)
        self.sqnr_db = self.plain_db = self._sqnr_db(self.int8)

    @property
    def reference(self) -> fx.GraphModule:
        """The float graph that the int8 one was made from."""
        return self.settings.reference

    @property
    def some(self) -> list[Case]:
        """The cases that layers are corrected and blamed on."""
        return _spread(self.fitted)

    def _quantized(self, settings: _Settings) -> fx.GraphModule:
        graph = copy.deepcopy(settings.reference)
        observed = static.prepared(graph, self.kept_float, careful=settings.careful)
        self.late_growth = calibrate(observed, self.fitted)
        int8 = static.converted(observed)
        if settings.corrected is not None:
            correct(int8, settings.reference, self.some, rounding=settings.corrected)
        return int8

    def _sqnr_db(self, int8: fx.GraphModule) -> float:
        """How close the outputs on `judged` are to the float ones."""
        return sqnr_of_outputs(self.expected, outputs_of(int8, self.judged))

    def try_steps(self, names: Sequence[str]) -> None:
        """Try these steps, after careful_ranges; what comes of it is never below plain int8."""
        if names:
            self._begin_with_careful_ranges()
        for name in STEPS[1:]:
            if name in names:
                self._try_step(name)
        if self.steps and self.steps[0].sqnr_db_after <= self.plain_db:
            self._undo_careful_ranges_if_vain()

    def _begin_with_careful_ranges(self) -> None:
        self.progress("trying careful_ranges")
        self.settings = replace(self.settings, careful=True)
        self.int8 = self._quantized(self.settings)
        self.sqnr_db = self._sqnr_db(self.int8)
        note = "ranges as wide as what was seen, scores in float"
        step = RecoveryStep("careful_ranges", self.plain_db, self.sqnr_db, True, note)
        self.steps.append(step)

    def _undo_careful_ranges_if_vain(self) -> None:
        """Leave careful_ranges out if the rest is better without, and all if plain int8 is."""
        for settings in dict.fromkeys((replace(self.settings, careful=False), self.plain)):
            if settings == self.plain and self.plain_db < self.sqnr_db:
                continue
            self.progress("trying the rest without careful_ranges")
            growth, candidate = self.late_growth, self._quantized(settings)
            sqnr_db = self._sqnr_db(candidate)
            if sqnr_db < self.sqnr_db:
                self.late_growth = growth
                continue
            self.int8, self.settings, self.sqnr_db = candidate, settings, sqnr_db
            undone = self.steps if settings == self.plain else self.steps[:1]
            self.steps = [replace(s, kept=s.kept and s not in undone) for s in self.steps]

    def _try_step(self, name: str) -> None:
        """Apply one step, and keep it if the outputs come closer to the float ones."""
        self.progress(f"trying {name}")
        before, growth, candidate = self.sqnr_db, self.late_growth, None
        if name == "equalization":
            settings = replace(self.settings, reference=copy.deepcopy(self.reference))
            groups = equalize(settings.reference, self.some)
            candidate = self._quantized(settings) if groups else None
            note = f"{groups} groups of tensors"
        else:
            settings = replace(self.settings, corrected=name == "rounding")
            candidate = copy.deepcopy(self.int8)
            layers = correct(candidate, self.reference, self.some, rounding=name == "rounding")
            note = f"{layers} layers"
        after = before if candidate is None else self._sqnr_db(candidate)
        kept = candidate is not None and after > before
        if kept:
            assert candidate is not None
            self.int8, self.settings, self.sqnr_db = candidate, settings, after
        else:
            self.late_growth = growth
        self.steps.append(RecoveryStep(name, before, after, kept, note))

    def fit_to_all(self) -> None:
        """Fit what was kept to the data that judged it as well."""
        if len(self.fitted) == len(self.data):
            return
        self.notes.append(
            f"Recovery was judged on {sample_count(self.judged)} of the {sample_count(self.data)} "
            "samples, which its steps were not fitted to; what was kept is fitted to all."
        )
        self.progress("fitting what helps to all of the data")
        self.fitted = self.data
        self.int8 = self._quantized(self.settings)
        self.sqnr_db = self._sqnr_db(self.int8)

    def keep_float(self, measure: Measure, before: float, max_drop: float) -> MaxDrop:
        """Leave the layers that lose most in float until the measure drops by at most max_drop."""
        layers = [node for node in self.reference.graph.nodes if node.target in static.LAYERS]
        drop = before - measure.of(self.int8, outputs_of(self.int8, self.data))
        if drop <= max_drop:
            return MaxDrop(measure.name, max_drop, drop, met=True)
        by_loss = _by_own_loss(self.int8, self.reference, self.some)
        at_a_time = max(1, round(len(layers) * _SHARE_KEPT))
        sqnr_before = self.sqnr_db
        while drop > max_drop and len(self.kept_float) < len(layers):
            self.kept_float += by_loss[len(self.kept_float) :][:at_a_time]
            self.progress(f"keeping layers in float, {len(self.kept_float)} of {len(layers)}")
            self.int8 = self._quantized(self.settings)
            drop = before - measure.of(self.int8, outputs_of(self.int8, self.data))
        self.sqnr_db = self._sqnr_db(self.int8)
        kept = len(self.kept_float)
        names = {node.name: static.module_path(node) or node.name for node in layers}
        shown = ", ".join(names[name] for name in self.kept_float[:_SHOWN])
        more = f" and {kept - _SHOWN} more" if kept > _SHOWN else ""
        note = f"{kept} of {len(layers)} layers: {shown}{more}"
        self.steps.append(RecoveryStep("keeping_float", sqnr_before, self.sqnr_db, True, note))
        reached = MaxDrop(measure.name, max_drop, drop, met=drop <= max_drop)
        if not reached.met:
            self.warnings.append(
                f"max_drop={max_drop:g} is not met: {measure.name} drops by {drop:.3g} with all "
                f"{kept} layers in float."
            )
        else:
            self.notes.append(
                f"{kept} of {len(layers)} layers stay in float to meet max_drop={max_drop:g}."
            )
        return reached


def _by_own_loss(int8: fx.GraphModule, reference: fx.GraphModule, data: list[Case]) -> list[str]:
    """Names of the layers' nodes, the one with most noise of its own first."""
    errors = errors_by_node(int8, reference, data)
    return sorted(errors, key=lambda name: _own(errors[name]))


def _own(error: LayerError) -> float:
    return math.inf if error.own_sqnr_db is None else error.own_sqnr_db
