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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torchfuse.checking import copy_tensors
from torchfuse.errors import InputError
from torchfuse.quantizing import static
from torchfuse.quantizing.calibration import calibrate, sample_count
from torchfuse.quantizing.equalization import equalize
from torchfuse.quantizing.report import Accuracy, LayerError, RecoveryStep
from torchfuse.quantizing.rounding import correct
from torchfuse.quantizing.sensitivity import errors_by_node, layer_errors, sqnr_db

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torchfuse.inputs import Case

__all__ = ["STEPS", "Recovered", "recovered"]

STEPS = ("careful_ranges", "equalization", "bias_correction", "rounding")
# Layers are kept in float a few at a time: this share of them, at least one.
_SHARE_KEPT = 0.05
_POINTS = 100.0
# Layers are corrected and blamed on so many cases, spread over the data: all their activations at
# one layer are in memory at once.
_MOST_CASES = 64


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
    work = _Work(graph, data)
    growth = work.late_growth
    for name in STEPS:
        if name in steps or (steps and name == "careful_ranges"):
            work.try_step(name)
    measure = _measure(data, work.expected, labels, evaluate)
    before = measure.of(graph, work.expected)
    notes = work.keep_float(measure, before, max_drop) if max_drop is not None else ()
    outputs = _outputs(work.int8, data)
    after = measure.of(work.int8, outputs)
    errors = layer_errors(work.int8, work.reference, work.some) if explain else ()
    return Recovered(
        model=work.int8,
        late_growth=growth,
        sqnr_db=_sqnr(work.expected, outputs),
        layers=errors,
        steps=tuple(work.steps),
        accuracy=(Accuracy(measure.name, before, after),) if measure.name else (),
        notes=tuple(notes),
    )


class _Work:
    """The best int8 graph so far, and the float graph that it was made from."""

    def __init__(self, graph: fx.GraphModule, data: list[Case]) -> None:
        self.data = data
        self.some = data[:: -(-len(data) // _MOST_CASES)]
        self.reference = graph
        self.expected = _outputs(graph, data)
        self.kept_float: list[str] = []
        self.corrected: bool | None = None  # None: not; False: biases; True: weights too
        self.steps: list[RecoveryStep] = []
        self.late_growth: float | None = None
        self.careful = False
        self.int8 = self._quantized(graph)
        self.sqnr_db = _sqnr(self.expected, _outputs(self.int8, data))

    def _quantized(self, graph: fx.GraphModule) -> fx.GraphModule:
        observed = static.prepared(copy.deepcopy(graph), self.kept_float, careful=self.careful)
        self.late_growth = calibrate(observed, self.data)
        int8 = static.converted(observed)
        if self.corrected is not None:
            correct(int8, graph, self.some, rounding=self.corrected)
        return int8

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
            after = _sqnr(self.expected, _outputs(candidate, self.data))
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
        self.sqnr_db = _sqnr(self.expected, _outputs(self.int8, self.data))
        note = "ranges as wide as what was seen, scores in float"
        step = RecoveryStep("careful_ranges", before, self.sqnr_db, True, note)
        self.steps.append(step)

    def keep_float(self, measure: _Measure, before: float, max_drop: float) -> list[str]:
        """Leave the layers that lose most in float until the measure drops by at most max_drop."""
        layers = [node.name for node in self.reference.graph.nodes if node.target in static.LAYERS]
        drop = before - measure.of(self.int8, _outputs(self.int8, self.data))
        if drop <= max_drop:
            return []
        by_loss = _by_own_loss(self.int8, self.reference, self.some)
        at_a_time = max(1, round(len(layers) * _SHARE_KEPT))
        sqnr_before = self.sqnr_db
        while drop > max_drop and len(self.kept_float) < len(layers):
            self.kept_float += by_loss[len(self.kept_float) :][:at_a_time]
            self.int8 = self._quantized(self.reference)
            drop = before - measure.of(self.int8, _outputs(self.int8, self.data))
        self.sqnr_db = _sqnr(self.expected, _outputs(self.int8, self.data))
        kept = len(self.kept_float)
        note = f"{kept} of {len(layers)} layers: {', '.join(self.kept_float[:8])}"
        self.steps.append(RecoveryStep("keeping_float", sqnr_before, self.sqnr_db, True, note))
        return [f"{kept} of {len(layers)} layers stay in float to meet max_drop={max_drop:g}."]


def _by_own_loss(int8: fx.GraphModule, reference: fx.GraphModule, data: list[Case]) -> list[str]:
    """Names of the layers' nodes, the one with most noise of its own first."""
    errors = errors_by_node(int8, reference, data)
    return [name for name, _ in sorted(errors, key=lambda entry: _own(entry[1]))]


def _own(error: LayerError) -> float:
    return math.inf if error.own_sqnr_db is None else error.own_sqnr_db


def _outputs(model: nn.Module, data: Sequence[Case]) -> list[list[Tensor]]:
    found = []
    with torch.no_grad():
        for case in data:
            args, kwargs = copy_tensors((case.args, dict(case.kwargs)))
            leaves = pytree.tree_leaves(model(*args, **kwargs))
            found.append([leaf for leaf in leaves if isinstance(leaf, Tensor)])
    return found


def _sqnr(expected: list[list[Tensor]], got: list[list[Tensor]]) -> float:
    signal = noise = 0.0
    for a_case, b_case in zip(expected, got, strict=True):
        for a, b in zip(a_case, b_case, strict=True):
            if a.is_floating_point():
                signal += float(a.double().square().sum())
                noise += float((a.double() - b.double()).square().sum())
    return sqnr_db(signal, noise)


@dataclass
class _Measure:
    """One number for a whole model, of which more is better."""

    name: str
    of: Callable[[nn.Module, list[list[Tensor]]], float]


def _measure(
    data: list[Case],
    expected: list[list[Tensor]],
    labels: Any,
    evaluate: Callable[[nn.Module], float] | None,
) -> _Measure:
    if evaluate is not None:
        name = getattr(evaluate, "__name__", "evaluate")
        return _Measure(name, lambda model, _: float(evaluate(model)))
    if labels is not None:
        wanted = torch.as_tensor(labels).flatten()
        samples = sample_count(data)
        if len(wanted) != samples:
            raise InputError(
                f"Expected a label for each of the {samples} calibration samples, "
                f"got {len(wanted)}."
            )
        return _Measure("top-1", lambda _, outputs: _share(_classes(outputs), wanted))
    if all(len(case) == 1 and case[0].dim() == 2 for case in expected):
        wanted = _classes(expected)
        return _Measure("agreement", lambda _, outputs: _share(_classes(outputs), wanted))
    return _Measure("SQNR in dB", lambda _, outputs: min(_sqnr(expected, outputs), _POINTS))


def _classes(outputs: list[list[Tensor]]) -> Tensor:
    if not all(len(case) == 1 and case[0].dim() == 2 for case in outputs):
        raise InputError(
            "Labels are for a model that returns one tensor of scores, [samples, classes]; give "
            "evaluate, a function of the model, instead."
        )
    return torch.cat([case[0].argmax(1) for case in outputs])


def _share(a: Tensor, b: Tensor) -> float:
    return _POINTS * float((a == b).double().mean())
