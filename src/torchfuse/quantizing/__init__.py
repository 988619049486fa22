"""A model in int8 (or int4) for XNNPACK: calibrated, corrected, and explained layer by layer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import fx, nn

from torchfuse.cases import cases, require_finite_tensors, require_float32
from torchfuse.errors import InputError, QuantizationWarning
from torchfuse.isolation.snapshot import random_state_kept
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.quantizing import dynamic, legacy, static
from torchfuse.quantizing.calibration import (
    CALIBRATED,
    SETTLED,
    CalibrationData,
    calibrate,
    read_calibration,
    sample_count,
)
from torchfuse.quantizing.preconditions import require_converted, require_eval_mode, require_forward
from torchfuse.quantizing.preprocessing import WithPreprocessing
from torchfuse.quantizing.quantization_report import (
    Accuracy,
    Calibrated,
    QuantizationReport,
    samples_in_words,
)
from torchfuse.quantizing.recovery import STEPS, Recovered, measured, recovered
from torchfuse.quantizing.sensitivity import layer_errors, without_few_samples
from torchfuse.quantizing.static import QuantizedLayer, argument_names, is_quantized_graph
from torchfuse.quantizing.unquantized import (
    in_float,
    mostly_float,
    quantized_share,
    require_quantized,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torchfuse.cases import Case
    from torchfuse.quantizing.preprocessing import Preprocessing
    from torchfuse.quantizing.quantization_report import LayerError

__all__ = [
    "QuantizationResult",
    "QuantizedLayer",
    "calibrate",
    "is_quantized_graph",
    "layers_of_int8",
    "quantize",
    "read_calibration",
    "require_converted",
    "require_eval_mode",
    "require_forward",
]

_BACKENDS = ("xnnpack", *legacy.ENGINES)
_SCHEMES = ("int8", "int8_dynamic", "int4")
# A range that still grew by more than this in the last tenth of the samples had not settled.
_SETTLED = 0.05
_RANDOM = (
    "Calibrated on random inputs: the ranges are those of noise, so this model is for measuring "
    "speed, not for use; calibrate on real inputs."
)
_RANDOM_MEASURES = "Measured on random inputs: on real ones the accuracy will be another."


class QuantizationResult(NamedTuple):
    """The quantized model, ready for `export`, what became of each layer, and what it cost."""

    model: nn.Module
    layers: tuple[QuantizedLayer, ...]
    report: QuantizationReport


def quantize(
    model: nn.Module,
    example_inputs: Any,
    calibration: Any = None,
    *,
    scheme: str | None = None,
    backend: str = "xnnpack",
    dynamic_shapes: Any = None,
    preprocessing: Preprocessing | None = None,
    recovery: Sequence[str] = (),
    max_drop: float | None = None,
    labels: Any = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    explain: bool = False,
    measure: bool = False,
    progress: Callable[[str], object] = lambda _: None,
) -> QuantizationResult:
    """Return `model` quantized, every layer's precision, and a report; `model` is unchanged.

    Args:
        model: in eval mode. Batch norms are folded first.
        example_inputs: a tensor, a tuple, a dict of keywords; of a list, the first.
        calibration: for "int8", some dozens of inputs as the model will see them: tensors, a
            DataLoader of inputs, an `.npy` or `.npz` file, a folder of pictures (with
            `preprocessing`), or "random" for noise. Batch and spatial sizes may differ.
        scheme: "int8" (static), "int8_dynamic" (weights in int8, activations by each input's own
            range) or "int4" (weights in groups of 32 along the inputs, activations dynamic). None
            takes "int8", or "int8_dynamic" for a model without convolutions that is given no
            calibration data.
        backend: "xnnpack" for `.pte`; for `.pt` and `.ptl` one of torch's own engines ("qnnpack" on
            Arm, "x86" on servers): static int8 without recovery, stubs put in automatically.
        dynamic_shapes: torch.export's.
        preprocessing: how pictures become inputs.
        recovery: steps that win accuracy back, out of "careful_ranges", "equalization",
            "bias_correction" and "rounding", in this order, the first of which comes with any
            other; each is reported with what it gained, and undone if that was nothing.
        max_drop: apply all steps, then keep the most sensitive layers in float, until accuracy
            drops by no more points than this: of top-1 with `labels`, of `evaluate`'s measure,
            else of agreement with the float model on the calibration data. Where that cannot be
            met, a warning says so, and the report's `max_drop.met` is False.
        labels: the class of each calibration sample, integers `[samples]`.
        evaluate: takes a model, returns a measure of which more is better.
        explain: measure each layer's error, and its likely cause.
        measure: say what was lost on the calibration data, as is done unasked where something is
            won back, explained or labelled.
        progress: called with a description before each long step.

    Raises:
        CalibrationError: the calibration data is missing, empty, constant, or holds NaN or Inf, or
            the model cannot run on it.
        InputError: an unknown scheme, backend or step; labels that do not fit; a model in training
            mode, in another precision than float32, or with weights that are NaN or Inf.
        UnsupportedError: torch.export cannot capture the model, or nothing in it can be quantized.
    """
    _check_options(scheme, backend, recovery, max_drop, evaluate)
    if backend == "xnnpack":
        static.require_quantizer()
    require_eval_mode(model)
    require_converted(model)
    require_float32(model)
    require_finite_tensors(model)
    example = cases(example_inputs, "example_inputs")[0]
    chosen, notes = _chosen_scheme(model, scheme, calibration)
    wanted = _Wanted(tuple(recovery), max_drop, labels, evaluate, explain, measure)
    if backend != "xnnpack":
        _require_plain(chosen, backend, wanted)
    if chosen != "int8":
        _require_no_ranges(chosen, calibration, wanted)
    data = None
    if chosen == "int8" or calibration is not None:
        progress("reading the calibration data")
        data = read_calibration(
            calibration,
            example,
            preprocessing,
            as_pixels=isinstance(model, WithPreprocessing),
            names=argument_names(model),
        )
        if labels is None and data.labels is not None and backend == "xnnpack":
            wanted = replace(wanted, labels=data.labels)
        if data.random:
            notes.append(_RANDOM if chosen == "int8" else _RANDOM_MEASURES)
    require_forward([example, *([] if data is None else data.cases)])
    with known_warnings_ignored(), random_state_kept():
        if backend != "xnnpack":
            assert data is not None
            progress(_calibrating(data))
            made = legacy.quantized(model, example, data.cases, backend)
            found = Recovered(made.model, made.late_growth)
            layers = made.layers
            notes += made.notes
        else:
            found = _for_xnnpack(model, example, data, chosen, dynamic_shapes, wanted, progress)
            layers = tuple(static.layers_of(found.model))
    notes += found.warnings
    if chosen == "int4":
        notes += _left_in_float(layers)
    on_request = any(step.name == "keeping_float" for step in found.steps)
    if not on_request:
        named = f"{chosen} for {'XNNPACK' if backend == 'xnnpack' else backend}"
        require_quantized(found.model.graph, layers, named)
        left = mostly_float(layers, named)
        if left is not None and chosen != "int4":  # that has a note of its own
            notes.append(f"Only {left}; expect little gain in size and speed.")
    _warn(notes)
    calibrated = None if data is None else _calibrated(data, found.late_growth)
    if calibrated is not None:
        found.model.meta[CALIBRATED] = f"{calibrated.source}, {calibrated.samples} samples"
    has_settled = calibrated is not None and calibrated.settled is True
    found.model.meta[SETTLED] = has_settled
    report = QuantizationReport(
        scheme=chosen if backend == "xnnpack" else f"{chosen} for {backend}",
        calibrated=calibrated,
        sqnr_db=found.sqnr_db,
        layers=without_few_samples(found.layers) if has_settled else found.layers,
        recovery=found.steps,
        accuracy=() if data is None else _on(data, found.accuracy, chosen, evaluate),
        notes=(*notes, *found.notes),
        in_float=in_float(layers),
        quantized_share=quantized_share(layers),
        max_drop=found.max_drop,
    )
    return QuantizationResult(found.model, layers, report)


def layers_of_int8(
    model: nn.Module, example_inputs: Any, data: Sequence[Case], int8: fx.GraphModule, *, look: int
) -> tuple[tuple[LayerError, ...], tuple[QuantizedLayer, ...]]:
    """Return the error and the precision of each layer of what `quantize` made of `model`.

    `data` is what it was calibrated on, of which no more than `look` cases are looked at.

    Raises:
        UnsupportedError: torch.export cannot capture the model.
    """
    cases_ = data[:: -(-len(data) // look)]
    with known_warnings_ignored(), random_state_kept():
        reference = static.float_graph(model, cases(example_inputs)[0], list(data), None)
        errors = layer_errors(int8, reference, cases_)
    # How many are looked at says nothing of how many there were to calibrate on.
    enough = int8.meta.get(SETTLED) or len(cases_) < len(data)
    return without_few_samples(errors) if enough else errors, tuple(static.layers_of(int8))


@dataclass(frozen=True)
class _Wanted:
    """What is to be measured and won back."""

    recovery: tuple[str, ...]
    max_drop: float | None
    labels: Any
    evaluate: Callable[[nn.Module], float] | None
    explain: bool
    measure: bool

    @property
    def nothing(self) -> bool:
        return (
            not self.recovery
            and self.max_drop is None
            and self.labels is None
            and self.evaluate is None
            and not self.explain
            and not self.measure
        )


def _for_xnnpack(
    model: nn.Module,
    example: Case,
    data: CalibrationData | None,
    scheme: str,
    dynamic_shapes: Any,
    wanted: _Wanted,
    progress: Callable[[str], object],
) -> Recovered:
    progress("capturing the model")
    if scheme != "int8":
        given = [] if data is None else data.cases
        traced, dynamic_shapes = static.widest(model, example, given, dynamic_shapes)
        made = dynamic.quantized(model, traced, scheme, dynamic_shapes)
        if not given:
            return Recovered(made.model, None)
        progress("measuring what was lost")
        return measured(
            made.model, made.reference, given, wanted.labels, wanted.evaluate, wanted.explain
        )
    assert data is not None
    graph = static.float_graph(model, example, data.cases, dynamic_shapes)
    progress(_calibrating(data))
    if wanted.nothing:
        observed = static.prepared(graph)
        growth = calibrate(observed, data.cases)
        return Recovered(static.converted(observed), growth)
    return recovered(
        graph,
        data.cases,
        steps=STEPS if wanted.max_drop is not None else wanted.recovery,
        max_drop=wanted.max_drop,
        labels=wanted.labels,
        evaluate=wanted.evaluate,
        explain=wanted.explain,
        progress=progress,
    )


def _calibrating(data: CalibrationData) -> str:
    count = sample_count(data.cases)
    return f"calibrating on {count} sample{'' if count == 1 else 's'}"


def _require_plain(scheme: str, backend: str, wanted: _Wanted) -> None:
    if scheme != "int8" or not wanted.nothing:
        raise InputError(
            f"For '{backend}' there is plain static int8 only; for other schemes, recovery, "
            "max_drop, labels, evaluate and explain use backend='xnnpack'."
        )


def _require_no_ranges(scheme: str, calibration: Any, wanted: _Wanted) -> None:
    given = {"recovery": bool(wanted.recovery), "max_drop": wanted.max_drop is not None}
    for name, is_given in given.items():
        if is_given:
            raise InputError(f"{name} is for static int8; {scheme} measures no ranges.")
    given = {
        "labels": wanted.labels is not None,
        "evaluate": wanted.evaluate is not None,
        "explain": wanted.explain,
    }
    for name, is_given in given.items():
        if is_given and calibration is None:
            raise InputError(
                f"{name} is about inputs: give some as calibration, on which {scheme} is measured."
            )


def _left_in_float(layers: Sequence[QuantizedLayer]) -> list[str]:
    left = [layer.module for layer in layers if layer.operator == "linear" and not layer.int8]
    if not left:
        return []
    return [
        f"{', '.join(left)} stay in float: int4 takes linear layers with a multiple of "
        f"{dynamic.GROUP_SIZE} inputs."
    ]


def _warn(notes: Sequence[str]) -> None:
    for note in notes:
        warnings.warn(note, QuantizationWarning, stacklevel=3)


def _check_options(
    scheme: str | None,
    backend: str,
    recovery: Sequence[str],
    max_drop: float | None,
    evaluate: Any,
) -> None:
    if backend not in _BACKENDS:
        raise InputError(f"Expected a backend of {', '.join(_BACKENDS)}, got '{backend}'.")
    if scheme is not None and scheme not in _SCHEMES:
        raise InputError(f"Expected a scheme of {', '.join(_SCHEMES)}, got {scheme!r}.")
    if isinstance(recovery, str):
        raise InputError(
            f"Expected a list of recovery steps, got {recovery!r}; use [{recovery!r}]."
        )
    for step in recovery:
        if step not in STEPS:
            raise InputError(f"There is no recovery step {step!r}; there are {', '.join(STEPS)}.")
    if max_drop is not None and not (isinstance(max_drop, (int, float)) and max_drop >= 0):
        raise InputError(f"Expected a max_drop of 0 points or more, got {max_drop!r}.")
    if evaluate is not None and not callable(evaluate):
        raise InputError(
            "Expected evaluate as a function that takes a model and returns a number, got "
            f"{type(evaluate).__name__}."
        )


def _chosen_scheme(model: nn.Module, scheme: str | None, calibration: Any) -> tuple[str, list[str]]:
    if scheme is not None or calibration is not None or isinstance(model, fx.GraphModule):
        return scheme or "int8", []
    convs = any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())
    linears = any(isinstance(module, nn.Linear) for module in model.modules())
    if convs or not linears:
        return "int8", []
    return "int8_dynamic", [
        "The model has linear layers and no convolutions, so activations are quantized as they "
        "come (int8_dynamic), which needs no calibration data."
    ]


def _on(
    data: CalibrationData, accuracy: Sequence[Accuracy], scheme: str, evaluate: Any
) -> tuple[Accuracy, ...]:
    """The measures, each with the data that it is on; the first is the user's, if there is one."""
    own = 0 if evaluate is None else 1
    words = samples_in_words(scheme, sample_count(data.cases))
    return (*accuracy[:own], *(replace(measure, data=words) for measure in accuracy[own:]))


def _calibrated(data: CalibrationData, growth: float | None) -> Calibrated:
    settled = None if growth is None else growth <= _SETTLED
    return Calibrated(data.source, sample_count(data.cases), settled, growth)
