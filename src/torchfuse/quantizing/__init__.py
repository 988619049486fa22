"""A model in int8 (or int4) for XNNPACK: calibrated, corrected, and explained layer by layer."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import fx, nn

from torchfuse.errors import InputError, QuantizationWarning
from torchfuse.inputs import cases
from torchfuse.quantizing import dynamic, legacy, static
from torchfuse.quantizing.calibration import (
    CalibrationData,
    calibrate,
    checked_calibration,
    read_calibration,
    sample_count,
)
from torchfuse.quantizing.fitness import require_eval_mode, require_forward
from torchfuse.quantizing.preprocessing import WithPreprocessing
from torchfuse.quantizing.recovery import STEPS, Recovered, recovered
from torchfuse.quantizing.report import Calibrated, QuantizationReport
from torchfuse.quantizing.static import QuantizedLayer, is_quantized_graph
from torchfuse.quieting import quiet
from torchfuse.restoring import random_state_kept

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torchfuse.quantizing.preprocessing import Preprocessing

__all__ = [
    "QuantizationResult",
    "QuantizedLayer",
    "calibrate",
    "checked_calibration",
    "is_quantized_graph",
    "quantize",
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
            else of agreement with the float model on the calibration data.
        labels: the class of each calibration sample, integers `[samples]`.
        evaluate: takes a model, returns a measure of which more is better.
        explain: measure each layer's error, and its likely cause.

    Raises:
        CalibrationError: the calibration data is missing, empty, constant, or holds NaN or Inf, or
            the model cannot run on it.
        InputError: an unknown scheme, backend or step; labels that do not fit.
        UnsupportedError: torch.export cannot capture the model.
    """
    _check_options(scheme, backend, recovery, max_drop)
    require_eval_mode(model)
    example = cases(example_inputs)[0]
    chosen, notes = _chosen_scheme(model, scheme, calibration)
    if backend != "xnnpack":
        wanted = {"recovery": recovery, "max_drop": max_drop, "labels": labels, "explain": explain}
        if chosen != "int8" or evaluate or any(wanted.values()):
            raise InputError(
                f"For '{backend}' there is plain static int8 only; for other schemes, recovery, "
                "labels, evaluate and explain use backend='xnnpack'."
            )
    if chosen != "int8":
        unfit = [n for n, given in (("recovery", recovery), ("max_drop", max_drop)) if given]
        if unfit:
            raise InputError(f"{unfit[0]} is for static int8; {chosen} measures no ranges.")
        require_forward([example])
        with random_state_kept():
            made = dynamic.quantized(model, example, chosen, dynamic_shapes)
        layers = tuple(static.layers_of(made))
        _warn(notes)
        report = QuantizationReport(chosen, None, None, (), (), (), tuple(notes))
        return QuantizationResult(made, layers, report)
    data = read_calibration(
        calibration, example, preprocessing, as_pixels=isinstance(model, WithPreprocessing)
    )
    require_forward([example, *data.cases])
    if backend != "xnnpack":
        with random_state_kept():
            int8, layers, growth = legacy.quantized(model, example, data.cases, backend)
        if data.random:
            notes.append(_RANDOM)
        _warn(notes)
        measured = _calibrated(data, growth)
        report = QuantizationReport(f"int8 for {backend}", measured, None, (), (), (), tuple(notes))
        return QuantizationResult(int8, layers, report)
    with quiet(), random_state_kept():
        graph = static.float_graph(model, example, data.cases, dynamic_shapes)
        if not (recovery or max_drop is not None or labels is not None or evaluate or explain):
            observed = static.prepared(graph)
            growth = calibrate(observed, data.cases)
            result = Recovered(static.converted(observed), growth)
        else:
            result = recovered(
                graph,
                data.cases,
                steps=STEPS if max_drop is not None else tuple(recovery),
                max_drop=max_drop,
                labels=labels,
                evaluate=evaluate,
                explain=explain,
            )
    calibrated = _calibrated(data, result.late_growth)
    if data.random:
        notes.append(_RANDOM)
    _warn(notes)
    report = QuantizationReport(
        scheme=chosen,
        calibrated=calibrated,
        sqnr_db=result.sqnr_db,
        layers=result.layers,
        recovery=result.steps,
        accuracy=result.accuracy,
        notes=(*notes, *result.notes),
    )
    return QuantizationResult(result.model, tuple(static.layers_of(result.model)), report)


def _warn(notes: Sequence[str]) -> None:
    for note in notes:
        warnings.warn(note, QuantizationWarning, stacklevel=3)


def _check_options(
    scheme: str | None, backend: str, recovery: Sequence[str], max_drop: float | None
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
    if max_drop is not None and max_drop < 0:
        raise InputError(f"Expected a max_drop of 0 points or more, got {max_drop}.")


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


def _calibrated(data: CalibrationData, growth: float | None) -> Calibrated:
    settled = None if growth is None else growth <= _SETTLED
    return Calibrated(data.source, sample_count(data.cases), settled, growth)
