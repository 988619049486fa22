"""The work of a comparison as independent jobs: build a file, measure, evaluate.

A job and its result are plain data; what all jobs are about is a `Subject`, which goes once to
wherever they run. Any number of builds and evaluations may run at the same time, on any machine;
a measurement runs alone on its device.
"""

import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from torchfuse.artifacts import Artifact, Precision
from torchfuse.cases import Case
from torchfuse.comparing.comparison import LOCAL, Answers, ChangedAnswer
from torchfuse.comparing.samples import Samples, batch_size
from torchfuse.devices.benching import Settings
from torchfuse.devices.facts import DeviceFacts, facts_of
from torchfuse.devices.local import Local
from torchfuse.devices.several import bench_devices
from torchfuse.errors import (
    ExportWarning,
    InputError,
    QuantizationWarning,
    UnsupportedError,
)
from torchfuse.exporting.model_files import CALIBRATED_ON_NOISE, exported, in_the_shape_of, load
from torchfuse.isolation.model_copy import copied
from torchfuse.measuring.tasks import task_of
from torchfuse.measuring.timing import Measurement, measure_interleaved
from torchfuse.quantizing.calibration import SETTLED, CalibrationData
from torchfuse.quantizing.metrics import name_of, number_from
from torchfuse.quantizing.preprocessing import Preprocessing
from torchfuse.quantizing.sensitivity import SignalToNoise
from torchfuse.stats import Share, share_of
from torchfuse.temporary import temporary_folder
from torchfuse.verifying.equivalence import Equivalence
from torchfuse.verifying.outputs import run, verify

__all__ = [
    "Build",
    "Built",
    "ComparedModel",
    "Evaluate",
    "Evaluated",
    "Evaluation",
    "MeasureTimes",
    "Measured",
    "Place",
    "accuracy_from",
    "build",
    "check_labels",
    "evaluate",
    "measure",
]

Evaluation = Callable[[Callable[..., Any]], float]
OnRound = Callable[[str], object]

# Every turn has untimed calls of its own; what is left for the warm-up is what a model does once.
_WARMUP_CALLS = 10
_MOST_COMPARED = 8  # cases of the calibration data
_SCORES_DIMENSIONS = 2


@dataclass(frozen=True, eq=False)
class ComparedModel:
    """What the jobs of one comparison are about."""

    model: nn.Module
    variants: Mapping[str, nn.Module]  # fused models by name
    examples: list[Case]  # the first is what is timed
    calibration: CalibrationData | None
    validation: Samples | None
    evaluate: Evaluation | None
    preprocessing: Preprocessing | None

    @property
    def alike(self) -> CalibrationData | None:
        """The calibration cases of the example's shape, to compare files on; None: there are none.

        Not all are: calibration takes other sizes too.
        """
        if self.calibration is None:
            return None
        found = in_the_shape_of(self.examples[0], self.calibration.cases, _MOST_COMPARED)
        return replace(self.calibration, cases=found, labels=None) if found else None

    @cached_property
    def expected(self) -> list[list[torch.Tensor]]:
        """What the model returns on the validation data, batch by batch."""
        assert self.validation is not None
        return list(_outputs(self.model, self.validation.batches(self.examples[0])))

    def module(self, variant: str) -> nn.Module:
        """Return the model of that variant."""
        return self.variants.get(variant, self.model)


@dataclass(frozen=True)
class Place:
    """A row of a comparison: what it is, and how it is run."""

    variant: str
    target: str
    precision: Precision
    path: Path | None  # of its file; None: a module in this process

    def __str__(self) -> str:
        return f"{self.variant}, {self.target}, {self.precision}"


@dataclass(frozen=True)
class Build:
    """A file to be made."""

    place: Place
    optimize: bool  # fold what is not fused


@dataclass(frozen=True)
class Built:
    """The file, or why there is none."""

    artifact: Artifact | None
    notes: tuple[str, ...]  # sentences
    left_out: str | None  # why
    took_s: float
    int8: fx.GraphModule | None = None  # what was made on the way, for whoever looks into it here


@dataclass(frozen=True)
class MeasureTimes:
    """What is to be timed in the same rounds on one device."""

    device: str
    places: tuple[Place, ...]
    runs: int
    threads: int


@dataclass(frozen=True)
class Measured:
    """The times, in the order of the places; none where the device failed."""

    device: DeviceFacts
    latencies: tuple[Measurement, ...]
    error: str | None = None


@dataclass(frozen=True)
class Evaluate:
    """A row whose outputs are to be looked at."""

    place: Place
    min_sqnr_db: float | None  # what its difference is judged by; None: rounding


@dataclass(frozen=True)
class Evaluated:
    """What came of it."""

    difference: Equivalence
    accuracy: Share | None
    answers: Answers | None


def build(job: Build, subject: ComparedModel) -> Built:
    """Return the file that a job asks for; what the target cannot do is left out with its reason.

    Raises:
        TorchfuseError: what is wrong with the model or the data, whatever the target.
    """
    place, began_s = job.place, time.perf_counter()
    assert place.path is not None
    try:
        with warnings.catch_warnings():
            for kind in (ExportWarning, QuantizationWarning):  # they become notes
                warnings.simplefilter("ignore", kind)
            artifact, reference = exported(
                subject.module(place.variant),
                subject.examples,
                place.path,
                precision=place.precision,
                calibration=subject.calibration if place.precision == "int8" else None,
                data=None if place.precision == "int8" else subject.alike,
                optimize=job.optimize,
                preprocessing=subject.preprocessing,
            )
    except UnsupportedError as error:
        return Built(None, (), str(error), time.perf_counter() - began_s)
    # That it was calibrated on noise is said once, of all files.
    remarks = [note for note in artifact.notes if note != CALIBRATED_ON_NOISE]
    notes = [f"{place.path.name}: {note}" for note in remarks]
    if artifact.delegation is not None and artifact.delegation.warning is not None:
        notes.insert(0, f"{place.precision} {place.target}: {artifact.delegation.warning}")
    int8 = None
    if isinstance(reference, fx.GraphModule) and SETTLED in reference.meta:  # by `quantize`
        int8 = reference
    return Built(artifact, tuple(notes), None, time.perf_counter() - began_s, int8)


def measure(
    job: MeasureTimes,
    subject: ComparedModel,
    on_round: OnRound = lambda _: None,
    on_partial: Callable[[Measured], object] = lambda _: None,
    earlier: Mapping[str, Measurement] | None = None,
) -> Measured:
    """Return the times of all places of a job, taken in turns; `on_partial` gets those so far.

    `earlier` is what an interrupted job measured of the same on this machine, by place.
    """
    case = subject.examples[0]
    names = {str(place): place for place in job.places}
    if job.device == LOCAL:
        facts = facts_of(Local())

        def measured(found: Mapping[str, Measurement]) -> Measured:
            return Measured(facts, tuple(found[name] for name in names))

        found = measure_interleaved(
            {name: place.path or _call(place, subject) for name, place in names.items()},
            case,
            warmup=_WARMUP_CALLS,
            runs=job.runs,
            threads=job.threads,
            earlier=earlier,
            on_round=lambda done, runs: on_round(f"timing, round {done} of {runs}"),
            on_partial=lambda found: on_partial(measured(found)),
        )
        return measured(found)
    with temporary_folder() as folder:
        tasks = {
            name: task_of(place.path, case, Path(folder))
            for name, place in names.items()
            if place.path is not None
        }
        (ran,) = bench_devices(
            tasks,
            [job.device],
            Settings(runs=job.runs, warmup=_WARMUP_CALLS, threads=job.threads),
            on_step=lambda device, step: on_round(f"{device}: {step}"),
        )
    by_name = {latency.name: latency for latency in ran.measurements if latency.samples_s}
    latencies = tuple(
        replace(by_name[name], cautions=ran.cautions) for name in names if name in by_name
    )
    return Measured(ran.device, latencies if ran.error is None else (), ran.error)


def evaluate(job: Evaluate, subject: ComparedModel, on_step: OnRound = lambda _: None) -> Evaluated:
    """Return how far a row's outputs are from the model's, and how right.

    Raises:
        InputError: `evaluate` raises, or returns something else; labels that do not fit.
    """
    place = job.place
    call = _call(place, subject)
    difference = verify(subject.model, call, subject.examples, min_sqnr_db=job.min_sqnr_db)
    answers = None
    if subject.validation is not None:
        answers = _answers(call, subject, on_step)
    accuracy = None if answers is None else answers.accuracy
    if subject.evaluate is not None:
        accuracy = accuracy_from(subject.evaluate, call)
    return Evaluated(difference, accuracy, answers)


def _call(place: Place, subject: ComparedModel) -> Callable[..., Any]:
    if place.path is not None:
        return load(place.path)
    module = subject.module(place.variant)
    if place.target != "channels_last":
        return module
    return copied(module).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # torch's stub lacks it


# ── answers ──────────────────────────────────────────────────────────────────────────────────────


def _answers(call: Callable[..., Any], subject: ComparedModel, on_step: OnRound) -> Answers:
    samples, example = subject.validation, subject.examples[0]
    assert samples is not None
    size = batch_size(example)
    noise = SignalToNoise()
    comparable = True
    before: list[int] = []
    after: list[int] = []
    count = len(samples) // size
    outputs = subject.expected, _outputs(call, samples.batches(example))
    for number, (expected, got) in enumerate(zip(*outputs, strict=True), 1):
        on_step(f"validating, {number} of {count}")
        comparable = [a.shape for a in expected] == [b.shape for b in got]
        if not comparable:
            break
        for a, b in zip(expected, got, strict=True):
            if a.is_floating_point():
                noise.take(a, b)
        if _are_scores(expected, size):
            before += expected[0].argmax(1).tolist()
            after += got[0].argmax(1).tolist()
    if not comparable or not before or len(before) < count * size:
        return Answers(count * size, noise.sqnr_db if comparable else None, None, None, ())
    labels = None if samples.labels is None else samples.labels[: len(before)]
    changed = tuple(
        ChangedAnswer(samples.names[i], a, b, None if labels is None else labels[i])
        for i, (a, b) in enumerate(zip(before, after, strict=True))
        if a != b
    )
    accuracy = None
    if labels is not None:
        right = sum(a == b for a, b in zip(after, labels, strict=True))
        accuracy = share_of(right, len(after))
    agreement = share_of(len(after) - len(changed), len(after))
    return Answers(len(after), noise.sqnr_db, agreement, accuracy, changed)


def _outputs(call: Callable[..., Any], given: Iterable[Case]) -> Iterator[list[torch.Tensor]]:
    """Yield the tensors that a callable returns for each case."""
    for case in given:
        leaves = pytree.tree_leaves(dict(run(call, case)))
        yield [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _are_scores(outputs: Sequence[torch.Tensor], size: int) -> bool:
    return (
        len(outputs) == 1
        and outputs[0].dim() == _SCORES_DIMENSIONS
        and outputs[0].is_floating_point()
        and len(outputs[0]) == size
        and outputs[0].shape[1] > 1
    )


def check_labels(model: nn.Module, samples: Samples, example: Case) -> None:
    """Find out, before the long work, whether labels are classes of what the model returns.

    Raises:
        InputError: they are not.
    """
    if samples.labels is None:
        return
    (first,) = _outputs(model, itertools.islice(samples.batches(example), 1))
    if not _are_scores(first, batch_size(example)):
        return
    classes = first[0].shape[1]
    if samples.classes not in (None, classes):
        raise InputError(
            f"Expected labels of the {classes} classes that the model tells apart, got the names "
            f"of {samples.classes} ({samples.source}), so it is not known which is which; name the "
            "folders, or give labels in a .csv, by the numbers of the classes."
        )
    if samples.labels and not 0 <= min(samples.labels) <= max(samples.labels) < classes:
        raise InputError(
            f"Expected labels of 0 to {classes - 1}, since the model tells {classes} classes "
            f"apart, got {min(samples.labels)} to {max(samples.labels)} in {samples.source}."
        )


def accuracy_from(evaluation: Evaluation, call: Callable[..., Any]) -> Share:
    """Return what the user's function says of a callable.

    Raises:
        InputError: it raises, or returns something else than an accuracy.
    """
    takes = (
        "what takes the model's inputs and returns its outputs (a module, or a function that runs "
        "a file)"
    )
    returns = "an accuracy, a number from 0 to 1"
    accuracy = number_from(evaluation, call, takes=takes, returns=returns)
    if not 0 <= accuracy <= 1:  # nor NaN
        raise InputError(
            f"Expected {name_of(evaluation)} to return an accuracy from 0 to 1, got {accuracy:g}; "
            "divide percentages by 100."
        )
    return Share(accuracy)
