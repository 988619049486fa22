"""`compare`: one model as fused and non-fused, float and int8, on every target of this machine."""

import copy
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.ao.quantization import QuantStub

from torchfuse.artifacts import Artifact, Precision, check_folder
from torchfuse.checking import verify
from torchfuse.comparison import FOLDED, NOT_FUSED, Comparison, Row
from torchfuse.errors import (
    ArtifactError,
    ExportWarning,
    InputError,
    QuantizationWarning,
    UnsupportedError,
    first_line,
)
from torchfuse.exporting import export, load
from torchfuse.fusing import fuse
from torchfuse.inputs import Case, cases
from torchfuse.quantizing import require_eval_mode, require_forward
from torchfuse.quantizing.calibration import (
    CalibrationData,
    read_calibration,
    sample_count,
    tensors_of,
)
from torchfuse.quantizing.preprocessing import Preprocessing, WithPreprocessing
from torchfuse.quantizing.static import argument_names
from torchfuse.timing import check_counts, measure_interleaved, ratio

__all__ = ["compare"]

Evaluate = Callable[[Callable[..., Any]], float]
Progress = Callable[[str], None]

# Every turn has untimed calls of its own; what is left for the warm-up is what a model does once.
_WARMUP_CALLS = 10


@dataclass(frozen=True)
class _Variant:
    variant: str
    target: str
    precision: str
    call: Callable[..., Any]
    artifact: Artifact | None = None


def compare(
    model: nn.Module,
    example_inputs: Any,
    *,
    fused: Mapping[str, nn.Module] | None = None,
    calibration: Any = None,
    preprocessing: Preprocessing | None = None,
    evaluate: Evaluate | None = None,
    folder: str | Path | None = None,
    threads: int = 1,
    runs: int = 50,
    progress: Progress = lambda _: None,
) -> Comparison:
    """Return how fast, how large and how different each variant of `model` is.

    The variants: eager (as it is, channels_last, fused), TorchScript (`.pt`, `.ptl`; fp32 and,
    where the model has quantization stubs, int8), ExecuTorch (`.pte`; fp32, fp16, int8, one row
    each, since its lowering folds batch norms on its own). All are timed in the same rounds, in
    random order: files in a process each, modules in this one.

    Args:
        model: in eval mode.
        example_inputs: as for `fuse`; the first case is what is timed.
        fused: fused models by name, where it is not simply the one that `fuse` returns. In
            TorchScript the last one is optimized for mobile, those before it are saved as they are.
        calibration: what int8 is calibrated on, as for `quantize`; None leaves the int8 variants
            out.
        preprocessing: how pictures become inputs, where `calibration` is a folder of them.
        evaluate: takes a callable (inputs to outputs) and returns an accuracy from 0 to 1.
        folder: where the artifacts are left; None: nowhere.
        threads: of torch and of ExecuTorch's runtime.
        runs: timed runs of each variant.
        progress: called with a description before each long step.

    Raises:
        ArtifactError: nothing can be written into the folder.
        CalibrationError: the calibration data is missing, empty, constant, or holds NaN or Inf.
        InputError: the model is in training mode, `evaluate` returns something else, or there is
            nothing to time.
    """
    if folder is not None:
        check_folder(folder)
    check_counts(runs, threads, None, {NOT_FUSED: model})
    require_eval_mode(model)
    examples = cases(example_inputs)
    require_forward(examples)
    case = examples[0]
    notes: list[str] = []
    data = None
    if calibration is not None:
        as_pixels = isinstance(model, WithPreprocessing)
        names = argument_names(model)
        data = read_calibration(calibration, case, preprocessing, as_pixels=as_pixels, names=names)
        notes.append(_calibrated(data, examples))
    accuracy = None
    if evaluate is not None:
        progress("evaluating the model")
        accuracy = _evaluated(evaluate, model)
    with tempfile.TemporaryDirectory() as temporary:
        variants = list(
            _variants(
                model,
                fused or {"fused": fuse(model, example_inputs).model},
                example_inputs,
                None if data is None else data.cases,
                _make(Path(folder or temporary)),
                notes,
                progress,
            )
        )
        latencies = measure_interleaved(
            {
                _name(variant): variant.artifact.path if variant.artifact else variant.call
                for variant in variants
            },
            case,
            warmup=_WARMUP_CALLS,
            runs=runs,
            threads=threads,
            on_round=lambda done, runs: progress(f"timing, round {done} of {runs}"),
        )
        rows = []
        for variant in variants:
            progress(f"comparing {_name(variant)}")
            latency = latencies[_name(variant)]
            if evaluate is not None and variant.call is not model:
                accuracy = _evaluated(evaluate, variant.call)
            rows.append(
                Row(
                    variant=variant.variant,
                    target=variant.target,
                    precision=variant.precision,
                    latency=latency,
                    speedup=ratio(latencies[_name(variants[0])], latency),
                    size_bytes=variant.artifact.size_bytes if variant.artifact else None,
                    difference=verify(
                        model, variant.call, examples, min_sqnr_db=_bound(variant.artifact)
                    ),
                    accuracy=accuracy,
                    delegation=variant.artifact.delegation if variant.artifact else None,
                )
            )
    return Comparison(type(model).__name__, tuple(rows), tuple(notes), platform.machine())


def _calibrated(data: CalibrationData, examples: list[Case]) -> str:
    """Return what int8 is calibrated on, and whether it is compared on the same."""
    if data.random:
        return (
            f"int8 is calibrated on {data.source}: its time and size are those of any calibration, "
            "its outputs are not"
        )
    count = sample_count(data.cases)
    told = f"int8 is calibrated on {data.source}, {count} sample{'' if count == 1 else 's'}"
    if not all(any(_holds(given, example) for given in data.cases) for example in examples):
        return told
    return f"{told}, and its difference is on a calibration sample itself"


def _holds(given: Case, example: Case) -> bool:
    """Whether the example's first sample is one of those given."""
    same = []
    for ours, theirs in zip(tensors_of(given), tensors_of(example), strict=False):
        if not ours.dim() or ours.shape[1:] != theirs.shape[1:]:
            return False
        same.append((ours == theirs[:1]).reshape(len(ours), -1).all(1))
    return len({len(rows) for rows in same}) == 1 and bool(torch.stack(same).all(0).any())


def _evaluated(evaluate: Evaluate, call: Callable[..., Any]) -> float:
    name = getattr(evaluate, "__name__", type(evaluate).__name__)
    try:
        value: Any = evaluate(call)
    except Exception as error:
        raise InputError(
            f"{name} ended in {type(error).__name__}: {first_line(error)}. It is called with what "
            "takes the model's inputs and returns its outputs: a module, or a function that runs a "
            "file."
        ) from error
    try:
        accuracy = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"Expected {name} to return an accuracy, a number from 0 to 1, got "
            f"{type(value).__name__}."
        ) from error
    if not 0 <= accuracy <= 1:  # nor NaN
        raise InputError(
            f"Expected {name} to return an accuracy from 0 to 1, got {accuracy:g}; divide "
            "percentages by 100."
        )
    return accuracy


def _bound(artifact: Artifact | None) -> float | None:
    """What a file's precision lets its outputs be judged by; None: equality within rounding."""
    if artifact is None or artifact.equivalence is None:
        return None
    asked, found = artifact.equivalence.min_sqnr_db, artifact.equivalence.sqnr_db
    return asked if asked is None or found is None else min(asked, found)


def _name(variant: _Variant) -> str:
    return f"{variant.variant}, {variant.target}, {variant.precision}"


def _variants(
    model: nn.Module,
    fused: Mapping[str, nn.Module],
    example_inputs: Any,
    calibration: Any,
    folder: Path,
    notes: list[str],
    progress: Progress,
) -> Iterator[_Variant]:
    yield _Variant(NOT_FUSED, "eager", "fp32", model)
    yield _Variant(NOT_FUSED, "channels_last", "fp32", _channels_last(model))
    for name, module in fused.items():
        yield _Variant(name, "eager", "fp32", module)

    def save(module: nn.Module, name: str, suffix: str, precision: Precision) -> _Variant:
        path = folder / f"{precision}_{name.replace(' ', '_')}.{suffix}"
        progress(f"saving {path.name}")
        with warnings.catch_warnings():
            for kind in (ExportWarning, QuantizationWarning):  # they become notes
                warnings.simplefilter("ignore", kind)
            artifact = export(
                module,
                example_inputs,
                path,
                precision=precision,
                calibration=calibration if precision == "int8" else None,
                optimize=name not in (NOT_FUSED, *list(fused)[:-1]),
            )
        if artifact.delegation is not None and artifact.delegation.warning is not None:
            notes.append(f"{precision} .{suffix}: {artifact.delegation.warning}")
        notes.extend(f"{path.name}: {note}" for note in artifact.notes)
        return _Variant(name, f".{suffix}", precision, load(path), artifact)

    legacy: list[Precision] = ["fp32"]
    lowered: list[Precision] = ["fp32", "fp16"]
    if calibration is None:
        notes.append("left out: int8, since there is no calibration data")
    else:
        lowered.append("int8")
        if any(isinstance(module, QuantStub) for module in model.modules()):
            legacy.append("int8")
        else:
            notes.append(
                "left out: int8 in TorchScript, since the model has no QuantStub and DeQuantStub"
            )
    wanted: list[tuple[nn.Module, str, str, Precision]] = [
        (module, name, suffix, precision)
        for precision in legacy
        for suffix in (("pt", "ptl") if precision == legacy[-1] else ("pt",))
        for name, module in {NOT_FUSED: model, **fused}.items()
    ]
    wanted += [(model, FOLDED, "pte", precision) for precision in lowered]
    for module, name, suffix, precision in wanted:
        try:
            yield save(module, name, suffix, precision)
        except UnsupportedError as error:
            notes.append(f"left out: {precision} .{suffix}, {name}: {error}")


def _channels_last(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    return copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # torch's stub lacks it


def _make(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"the folder '{folder}' cannot be made: {error.strerror}; give another one"
        ) from error
    return folder
