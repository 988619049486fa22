"""The fastest file of a model on this machine, of all the targets that are installed."""

import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchfuse.artifacts import Artifact, Precision, check_destination, write_all_atomically
from torchfuse.cases import Case, cases
from torchfuse.errors import ExportWarning, InputError, UnsupportedError
from torchfuse.exporting.model_files import export, in_the_shape_of, load
from torchfuse.measuring.timing import Measurement, check_counts, measure_interleaved, ratio
from torchfuse.quantizing import read_calibration
from torchfuse.quantizing.preprocessing import Preprocessing, WithPreprocessing
from torchfuse.quantizing.static import argument_names
from torchfuse.stats import Ratio
from torchfuse.targets import TARGETS, Target, target_of
from torchfuse.units import duration, size
from torchfuse.verifying.outputs import run

__all__ = ["Candidate", "Fastest", "export_fastest"]

_MOST_CASES = 256  # of the data, on which classes are compared
_SCORES_DIMENSIONS = 2  # [samples, classes]


@dataclass(frozen=True)
class Candidate:
    """A target, and how fast its file is; or why there is none."""

    suffix: str
    name: str
    artifact: Artifact | None = None
    latency: Measurement | None = None
    slower: Ratio | None = None  # its median over that of the fastest file
    drop_points: float | None = None  # of 100 samples, whose class is another one; None: not asked
    reason: str | None = None  # why it is not chosen, or not made; None: it could be

    def __str__(self) -> str:
        """As a line of the table."""
        if self.latency is None or self.artifact is None:
            return f"{self.suffix:<10} {self.reason}"
        drop = "" if self.drop_points is None else f"  drop {self.drop_points:5.2f}"
        slower = "" if self.slower is None else f"  {self.slower}"
        if self.slower is not None and self.slower.measurable:
            slower += " times the fastest's time"
        reason = "" if self.reason is None else f"  ({self.reason})"
        return (
            f"{self.suffix:<10} {duration(self.latency.median_s):>12}"
            f"  {size(self.artifact.size_bytes):>11}{drop}{slower}{reason}"
        )


@dataclass(frozen=True)
class Fastest:
    """The fastest file, which was written, and all that it was compared with."""

    artifact: Artifact
    candidates: tuple[Candidate, ...]  # the fastest first; those of which no file was made last
    threads: int

    def __str__(self) -> str:
        """The table, and a sentence."""
        chosen, *others = [c for c in self.candidates if c.latency is not None and not c.reason]
        even = [c.suffix for c in others if c.slower is not None and not c.slower.measurable]
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        text = f"{chosen.name} ({chosen.suffix}) is the fastest here in {self.artifact.precision}"
        if even:
            text += f", with no measurable difference to {' and '.join(even)}"
        return "\n".join([*map(str, self.candidates), f"{text}, on {threads}."])


def export_fastest(
    model: nn.Module,
    example_inputs: Any,
    stem: str | os.PathLike[str],
    *,
    precision: Precision | None = None,
    calibration: Any = None,
    random_examples: bool = False,
    dynamic_shapes: Any = None,
    max_drop: float | None = None,
    preprocessing: Preprocessing | None = None,
    threads: int = 1,
    runs: int = 50,
    progress: Callable[[str], object] = lambda _: None,
) -> Fastest:
    """Write the file that is fastest on this machine, as `stem` and its target's suffix.

    The model is exported to every target that is installed and has the precision. All files are
    timed in the same rounds, in a process each, on `threads` threads of their runtimes.

    Args:
        model: in eval mode.
        example_inputs: as for `export`; the first case is what is timed.
        stem: the path without a suffix.
        precision: of all that are compared; None: as the model is.
        calibration: for int8, as for `export`; else what the files are compared on, its `data`.
        random_examples: as for `export`.
        dynamic_shapes: as for `export`.
        max_drop: how many of 100 samples of the calibration data may get another class than the
            model gives them; None: whatever `export` lets pass.
        preprocessing: as for `export`.
        threads: that every runtime is given.
        runs: timed runs of each file.
        progress: called with a description before each long step.

    Raises:
        ArtifactError: the file cannot be written.
        InputError: nothing to time, or `max_drop` without calibration data or class scores.
        UnsupportedError: no target can have the model, or none within `max_drop`.
    """
    stem = Path(stem)
    check_counts(runs, threads, None, {"model": model})
    candidates = [target for target in TARGETS if _is_candidate(target, precision, dynamic_shapes)]
    for target in candidates:
        for suffix in (target.suffix, *target.beside):
            check_destination(stem.with_name(stem.name + suffix))
    examples = cases(example_inputs)
    data = _data(model, examples, calibration, max_drop, preprocessing)
    with tempfile.TemporaryDirectory() as folder:
        made = [
            _made(target, Path(folder), progress, lambda path: export(
                model,
                example_inputs,
                path,
                precision=precision,
                calibration=calibration if precision == "int8" else None,
                data=None if precision == "int8" else calibration,
                random_examples=random_examples,
                dynamic_shapes=dynamic_shapes,
                preprocessing=preprocessing,
            ))
            for target in candidates
        ]  # fmt: skip
        measured = _measured(made, examples[0], threads, runs, progress)
        if max_drop is not None:
            progress("comparing classes")
            measured = [_judged(candidate, model, data, max_drop) for candidate in measured]
        best = _best(measured, max_drop)
        ordered = _ordered(measured, best)
        assert best.artifact is not None
        artifact = _kept(best.artifact, stem)
    final = [replace(c, artifact=artifact) if c.suffix == best.suffix else c for c in ordered]
    return Fastest(artifact, tuple(final), threads)


def _is_candidate(target: Target, precision: Precision | None, dynamic_shapes: Any) -> bool:
    if target.obstacle() is not None or (precision not in (None, *target.precisions)):
        return False
    return dynamic_shapes is None or target.takes_dynamic_shapes


def _data(
    model: nn.Module,
    examples: list[Case],
    calibration: Any,
    max_drop: float | None,
    preprocessing: Preprocessing | None,
) -> list[Case]:
    """Return the samples on which classes are compared; none where that was not asked for."""
    if max_drop is None:
        return []
    if calibration is None:
        raise InputError(
            "max_drop counts samples that get another class, so it needs data: give calibration."
        )
    given = read_calibration(
        calibration,
        examples[0],
        preprocessing,
        as_pixels=isinstance(model, WithPreprocessing),
        names=argument_names(model),
    )
    data = in_the_shape_of(examples[0], given.cases, _MOST_CASES)
    scores = _scores(run(model, examples[0]))
    if scores is None or not data:
        raise InputError(
            "max_drop counts samples that get another class, but the model returns no scores, "
            "[samples, classes], or no calibration sample has the example's shape; leave it out."
        )
    return data


def _scores(outputs: dict[str, Any]) -> torch.Tensor | None:
    tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    if len(tensors) != 1 or tensors[0].dim() != _SCORES_DIMENSIONS or tensors[0].shape[1] < 2:
        return None
    return tensors[0]


def _made(
    target: Target,
    folder: Path,
    progress: Callable[[str], object],
    make: Callable[[Path], Artifact],
) -> Candidate:
    progress(f"exporting to {target.name}")
    candidate = Candidate(target.suffix, target.name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExportWarning)  # notes of the artifact say it
            return replace(candidate, artifact=make(folder / f"model{target.suffix}"))
    except UnsupportedError as error:
        return replace(candidate, reason=str(error))


def _measured(
    made: Sequence[Candidate],
    case: Case,
    threads: int,
    runs: int,
    progress: Callable[[str], object],
) -> list[Candidate]:
    paths = {c.suffix: c.artifact.path for c in made if c.artifact is not None}
    if not paths:
        reasons = " ".join(f"{c.suffix}: {c.reason}" for c in made)
        raise UnsupportedError(f"No target here can have this model. {reasons}")
    latencies = measure_interleaved(
        paths,
        case,
        threads=threads,
        runs=runs,
        on_round=lambda done, rounds: progress(f"timing, round {done} of {rounds}"),
    )
    return [replace(c, latency=latencies.get(c.suffix)) for c in made]


def _judged(
    candidate: Candidate, model: nn.Module, data: Sequence[Case], max_drop: float
) -> Candidate:
    if candidate.artifact is None:
        return candidate
    loaded = load(candidate.artifact.path)
    total = other = 0
    for case in data:
        wanted, got = _scores(run(model, case)), _scores(run(loaded, case))
        assert wanted is not None
        assert got is not None
        other += int((wanted.argmax(1) != got.argmax(1)).sum())
        total += len(wanted)
    drop = 100 * other / total
    over = f"loses more than {max_drop:g} points" if drop > max_drop else None
    return replace(candidate, drop_points=drop, reason=over)


def _median(candidate: Candidate) -> float:
    return float("inf") if candidate.latency is None else candidate.latency.median_s


def _best(measured: Sequence[Candidate], max_drop: float | None) -> Candidate:
    possible = [c for c in measured if c.latency is not None and c.reason is None]
    if not possible:
        lost = ", ".join(
            f"{c.suffix} loses {c.drop_points:.3g}" for c in measured if c.drop_points is not None
        )
        raise UnsupportedError(
            f"No file loses at most {max_drop} points of agreement with the model: {lost}; allow "
            "more with max_drop, give more calibration data, or take another precision."
        )
    return min(possible, key=_median)


def _ordered(measured: Sequence[Candidate], best: Candidate) -> list[Candidate]:
    assert best.latency is not None
    compared = [
        c if c.latency is None or c is best else replace(c, slower=ratio(c.latency, best.latency))
        for c in measured
    ]
    return sorted(compared, key=lambda c: (c is not best, _median(c)))


def _kept(artifact: Artifact, stem: Path) -> Artifact:
    """Write what lies in a temporary folder to where it is to be; return it as it is there."""
    suffix = target_of(artifact.format).suffix
    named = {artifact.path: stem.with_name(stem.name + suffix)}
    for path in artifact.beside:
        named[path] = stem.with_name(stem.name + path.suffix)
    # The first file last: it holds the checksums of the others.
    write_all_atomically({named[path]: path.read_bytes() for path in reversed(named)})
    beside = tuple(named[path] for path in artifact.beside)
    return replace(artifact, path=named[artifact.path], beside=beside)
