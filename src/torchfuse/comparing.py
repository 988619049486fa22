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

from torchfuse.artifacts import Artifact, Precision
from torchfuse.checking import verify
from torchfuse.comparison import FOLDED, NOT_FUSED, Comparison, Row
from torchfuse.errors import ArtifactError, ExportWarning, UnsupportedError
from torchfuse.exporting import export, load
from torchfuse.fusing import fuse
from torchfuse.inputs import cases
from torchfuse.timing import measure_interleaved, ratio

__all__ = ["compare"]

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
    evaluate: Callable[[Callable[..., Any]], float] | None = None,
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
        calibration: what int8 is calibrated on; None leaves the int8 variants out.
        evaluate: takes a callable (inputs to outputs) and returns an accuracy from 0 to 1.
        folder: where the artifacts are left; None: nowhere.
        threads: of torch and of ExecuTorch's runtime.
        runs: timed runs of each variant.
        progress: called with a description before each long step.
    """
    notes: list[str] = []
    case = cases(example_inputs)[0]
    with tempfile.TemporaryDirectory() as temporary:
        variants = list(
            _variants(
                model,
                fused or {"fused": fuse(model, example_inputs).model},
                example_inputs,
                calibration,
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
            rows.append(
                Row(
                    variant=variant.variant,
                    target=variant.target,
                    precision=variant.precision,
                    latency=latency,
                    speedup=ratio(latencies[_name(variants[0])], latency),
                    size_bytes=variant.artifact.size_bytes if variant.artifact else None,
                    difference=verify(model, variant.call, example_inputs),
                    accuracy=None if evaluate is None else evaluate(variant.call),
                    delegation=variant.artifact.delegation if variant.artifact else None,
                )
            )
    return Comparison(type(model).__name__, tuple(rows), tuple(notes), platform.machine())


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
            warnings.simplefilter("ignore", ExportWarning)  # it becomes a note
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
