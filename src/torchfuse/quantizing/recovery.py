"""Winning back accuracy after static int8, in order of cost, each step measured and undone if vain.

1. careful_ranges: nothing that was seen is cut off, and scores stay in float (`static.py`). The
   other steps begin with it: they correct what is rounded, and what is cut off misleads them.
2. equalization: factors per channel that change nothing in float (`equalization.py`).
3. bias_correction: the shift that int8 puts on each channel's mean, taken back (`rounding.py`).
4. rounding: weights rounded so that each layer's output stays, which includes step 3.
5. with `max_drop`: the layers that lose most stay in float, one more at a time.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torchfuse.errors import InputError
from torchfuse.quantizing import static
from torchfuse.quantizing.calibration import calibrate
from torchfuse.quantizing.equalization import equalize
from torchfuse.quantizing.measures import (
    Measure,
    Outputs,
    measures,
    outputs_of,
    sqnr_of_outputs,
)
from torchfuse.quantizing.report import Accuracy, LayerError, MaxDrop, RecoveryStep
from torchfuse.quantizing.rounding import correct
from torchfuse.quantizing.sensitivity import errors_by_node, layer_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import fx, nn

    from torchfuse.inputs import Case

_T = TypeVar("_T")

__all__ = ["STEPS", "Recovered", "measured", "recovered"]

STEPS = ("careful_ranges", "equalization", "bias_correction", "rounding")
# Layers are kept in float a few at a time: this share of them, at least one.
_SHARE_KEPT = 0.05
_SHOWN = 8  # names in a note
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
    work = _Work(graph, data, expected)
    growth = work.late_growth
    for name in STEPS:
        if name in steps or (steps and name == "careful_ranges"):
            work.try_step(name)
    kept = None if max_drop is None else work.keep_float(wanted[0], before[0], max_drop)
    outputs = outputs_of(work.int8, data)
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
        Accuracy(measure.name, was, measure.of(model, outputs))
        for measure, was in zip(wanted, before, strict=True)
    )


def _spread(data: list[_T]) -> list[_T]:
    """No more cases than layers are looked at on, evenly from all of them."""
    return data[:: -(-len(data) // _MOST_CASES)]


class _Work:
    """The best int8 graph so far, and the float graph that it was made from."""

    def __init__(self, graph: fx.GraphModule, data: list[Case], expected: Outputs) -> None:
        self.data = data
        self.some = _spread(data)
        self.reference = graph
        self.expected = _spread(expected)  # of `some`, on which the steps are measured
        self.kept_float: list[str] = []
        self.corrected: bool | None = None  # None: not; False: biases; True: weights too
        self.steps: list[RecoveryStep] = []
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.late_growth: float | None = None
        self.careful = False
        self.int8 = self._quantized(graph)
        self.sqnr_db = self._sqnr_db(self.int8)

    def _quantized(self, graph: fx.GraphModule) -> fx.GraphModule:
        observed = static.prepared(copy.deepcopy(graph), self.kept_float, careful=self.careful)
        self.late_growth = calibrate(observed, self.data)
        int8 = static.converted(observed)
        if self.corrected is not None:
            correct(int8, graph, self.some, rounding=self.corrected)
        return int8

    def _sqnr_db(self, int8: fx.GraphModule) -> float:
        """How close the outputs on `some` are to the float ones."""
        return sqnr_of_outputs(self.expected, outputs_of(int8, self.some))

    def try_step(self, name: str) -> None:
        """Apply one step, and keep it if the outputs come closer to the float ones."""
        if name == "careful_ranges":
            self._try_careful_ranges()
            return
        before, graph, corrected, note = self.sqnr_db, self.reference, self.corrected, ""
        candidate = None
        if name == "equalization":
            graph = copy.deepcopy(graph)
            groups = equalize(graph, self.some)
            note = f"{groups} groups of tensors"
            candidate = self._quantized(graph) if groups else None
        else:
            self.corrected = name == "rounding"
            candidate = copy.deepcopy(self.int8)
            layers = correct(candidate, graph, self.some, rounding=self.corrected)
            note = f"{layers} layers"
        after = before
        if candidate is not None:
            after = self._sqnr_db(candidate)
        kept = after > before and candidate is not None
        if kept:
            assert candidate is not None
            self.int8, self.reference, self.sqnr_db = candidate, graph, after
        else:
            self.corrected = corrected
        self.steps.append(RecoveryStep(name, before, after, kept, note))

    def _try_careful_ranges(self) -> None:
        """Kept whatever it gains, since the other steps build on it."""
        before = self.sqnr_db
        self.careful = True
        self.int8 = self._quantized(self.reference)
        self.sqnr_db = self._sqnr_db(self.int8)
        note = "ranges as wide as what was seen, scores in float"
        step = RecoveryStep("careful_ranges", before, self.sqnr_db, True, note)
        self.steps.append(step)

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
            self.int8 = self._quantized(self.reference)
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
