"""The measuring loop: how long one call takes, sampled call by call, on pinned threads."""

import contextlib
import functools
import gc
import os
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchfuse import serialization
from torchfuse.errors import InputError, UnsupportedError
from torchfuse.measuring.cautions import Caution, TimedSamples, resumed
from torchfuse.measuring.cautions import cautions as cautions_of
from torchfuse.runner.loop import Clock, Turns, interleave, timed, turn_length, warm_up
from torchfuse.runner.machine_state import MachineState, this_state
from torchfuse.runner.workers import Worker, WorkerError, start_workers
from torchfuse.stats import Ratio, percentile, ratio_of_medians
from torchfuse.temporary import temporary_folder
from torchfuse.units import duration

if TYPE_CHECKING:
    from torchfuse.measuring.tasks import Task

__all__ = [
    "FileFacts",
    "Measurement",
    "check_counts",
    "file_facts",
    "measure",
    "measure_interleaved",
    "measure_prepared",
    "pinned_threads",
    "ratio",
    "round_id_of",
]

Runnable = Callable[..., Any]


@dataclass(frozen=True)
class FileFacts:
    """What is measured of a model file besides its calls, in the process that it had to itself."""

    size_bytes: int
    sha256: str
    load_s: float | None  # the runtime already in memory; None: the runner does not say
    first_inference_s: float | None
    idle_memory_bytes: int | None  # of the process before it loaded the file; None: unknown
    peak_memory_bytes: int | None = None  # of the process at its largest since
    page_faults: float | None = None  # minor ones in a timed call, on average

    @property
    def model_memory_bytes(self) -> int | None:
        """How much the process grew at most by loading and running the file."""
        if self.peak_memory_bytes is None or self.idle_memory_bytes is None:
            return None
        return self.peak_memory_bytes - self.idle_memory_bytes


@dataclass(frozen=True)
class Measurement:
    """The time of every single call, in seconds and in the order of the calls."""

    name: str
    samples_s: tuple[float, ...]
    warmup_runs: int
    settled: bool | None  # whether the warm-up ended because the times had; None: not looked at
    threads: int | None  # None: the runner cannot be told, and does not say
    round_id: str | None = None  # the same for measurements that were taken in the same rounds
    turn_runs: int = 1  # samples in a row, of which each round has as many
    file: "FileFacts | None" = None  # None: a live callable, called in the measuring process
    cautions: tuple[Caution, ...] = ()  # what makes it less trustworthy, each with what to change
    page_faults: float | None = None  # of a live callable, as a file's

    def __str__(self) -> str:
        """The median with its spread: `net: 1.23 ms (IQR 0.04 ms), 50 runs, threads: 1`."""
        where = ", in this process" if self.file is None else ""
        return (
            f"{self.name}: {duration(self.median_s)} (IQR {duration(self.iqr_s, self.median_s)}), "
            f"{self.runs} runs, threads: {self.threads}{where}"
        )

    @property
    def runs(self) -> int:
        """How many samples there are."""
        return len(self.samples_s)

    @property
    def median_s(self) -> float:
        """The median time of a call."""
        return statistics.median(self.samples_s)

    @property
    def iqr_s(self) -> float:
        """The interquartile range: the width of the middle half of the samples."""
        return percentile(self.samples_s, 75) - percentile(self.samples_s, 25)

    @property
    def p5_s(self) -> float:
        """The time that 5 % of the calls do not exceed."""
        return percentile(self.samples_s, 5)

    @property
    def p95_s(self) -> float:
        """The time that 95 % of the calls do not exceed."""
        return percentile(self.samples_s, 95)

    @property
    def min_s(self) -> float:
        """The fastest call."""
        return min(self.samples_s)

    @property
    def max_s(self) -> float:
        """The slowest call."""
        return max(self.samples_s)

    @property
    def mean_s(self) -> float:
        """The mean time of a call."""
        return statistics.fmean(self.samples_s)

    @property
    def calls_per_s(self) -> float:
        """Calls in a second, at the median."""
        return 1 / self.median_s

    @property
    def samples(self) -> TimedSamples:
        """The samples as `noise.cautions` takes them."""
        page_faults = self.page_faults if self.file is None else self.file.page_faults
        return TimedSamples(
            self.samples_s, self.turn_runs, self.settled, self.warmup_runs, page_faults
        )

    def to_json(self) -> str:
        """Return this measurement as JSON, every sample included."""
        return serialization.to_json(self)

    @classmethod
    def from_json(cls, text: str) -> "Measurement":
        """Return the measurement that `to_json` wrote.

        Raises:
            InputError: it did not write this text.
        """
        return serialization.from_json(cls, text)


def ratio(numerator: Measurement, denominator: Measurement) -> Ratio:
    """Return how many times longer `numerator` takes than `denominator`, with its interval."""
    together = numerator.round_id is not None and numerator.round_id == denominator.round_id
    if not together:
        return ratio_of_medians(numerator.samples_s, denominator.samples_s)
    return ratio_of_medians(
        numerator.samples_s, denominator.samples_s, round_runs=numerator.turn_runs
    )


def measure(
    runnable_or_path: Runnable | str | os.PathLike[str],
    inputs: Any,
    *,
    name: str | None = None,
    warmup: int | None = None,
    runs: int = 50,
    threads: int = 1,
    clock: Clock = time.perf_counter,
) -> Measurement:
    """Return the time of `runs` calls of a model, or of the artifact at a path.

    `inputs` is one case: a tensor, a tuple of tensors, or a dict of keyword tensors.
    `warmup=None` warms up until the times have settled, with a minimum and a maximum.

    Raises:
        InputError: no runs, no threads, or several cases.
        ArtifactError: the file is missing, damaged or of an unknown kind.
    """
    name = name or _name(runnable_or_path)
    measurements = measure_interleaved(
        {name: runnable_or_path}, inputs, warmup=warmup, runs=runs, threads=threads, clock=clock
    )
    return measurements[name]


def measure_interleaved(
    variants: Mapping[str, Runnable | str | os.PathLike[str]],
    inputs: Any,
    *,
    warmup: int | None = None,
    runs: int = 50,
    threads: int = 1,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    earlier: Mapping[str, Measurement] | None = None,
    on_round: Callable[[int, int], object] | None = None,
    on_partial: Callable[[dict[str, Measurement]], object] | None = None,
) -> dict[str, Measurement]:
    """Return one measurement per variant, all taken in the same rounds.

    A path's file is loaded and run in a process of its own, a callable is called in this one. In
    each round every variant has a turn, in random order, so that what slows the machine down for a
    while slows all of them. A turn is a few calls that are not timed, since the variant before has
    pushed this one's weights out of the caches, and a few that are. `clock` is for callables.
    `earlier` is as for `measure_prepared`.

    After every round, `on_round(done, all)` is told, and `on_partial` is given the measurements so
    far, so that a caller can show or save them.

    Raises:
        InputError: no variants, no runs, no threads, several cases, or a model in half precision
            that does not run on them.
        ArtifactError: a file is missing, damaged or of an unknown kind.
        UnsupportedError: a file's process ended.
    """
    from torchfuse.cases import cases, half_precision
    from torchfuse.measuring.tasks import Task, task_of

    check_counts(runs, threads, warmup, variants)
    loaded = {name: v for name, v in variants.items() if hasattr(v, "set_threads")}
    all_cases = cases(inputs)
    if len(all_cases) != 1:
        raise InputError(
            f"A time belongs to one input, got {len(all_cases)} cases; measure each on its own."
        )
    case = all_cases[0]
    with temporary_folder() as folder, _threads_of(loaded.values(), threads):
        prepared: dict[str, Callable[[], Any] | Task] = {
            name: task_of(variant, case, Path(folder))
            if isinstance(variant, str | os.PathLike)
            else functools.partial(variant, *case.args, **case.kwargs)
            for name, variant in variants.items()
        }
        try:
            return measure_prepared(
                prepared,
                warmup=warmup,
                runs=runs,
                threads=threads,
                seed=seed,
                clock=clock,
                earlier=earlier,
                on_round=on_round,
                on_partial=on_partial,
            )
        except Exception as error:
            for variant in variants.values():
                if (half := half_precision(variant, case, error)) is not None:
                    raise half from error
            raise


def measure_prepared(
    variants: "Mapping[str, Callable[[], Any] | Task]",
    *,
    warmup: int | None = None,
    runs: int = 50,
    threads: int = 1,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    earlier: Mapping[str, Measurement] | None = None,
    on_round: Callable[[int, int], object] | None = None,
    on_partial: Callable[[dict[str, Measurement]], object] | None = None,
) -> dict[str, Measurement]:
    """Return what `measure_interleaved` does, of calls without arguments and of tasks.

    `earlier` is what an interrupted run measured of the same; its rounds are not repeated.
    """
    import torch

    from torchfuse.measuring.tasks import Task

    check_counts(runs, threads, warmup, variants)
    tasks = {name: variant for name, variant in variants.items() if isinstance(variant, Task)}
    calls = {
        name: timed(variant, clock)
        for name, variant in variants.items()
        if not isinstance(variant, Task)
    }
    live = {name: Turns(call) for name, call in calls.items()}
    length = turn_length(len(variants), runs)
    earlier = earlier or {}
    rounds_done = min(earlier[name].runs if name in earlier else 0 for name in variants) // length
    round_id = None if len(variants) == 1 else round_id_of(earlier)
    forms = sorted({task.form for task in tasks.values()})
    with (
        start_workers(len(tasks), forms) as workers,
        pinned_threads(threads) if calls else contextlib.nullcontext(),
        torch.inference_mode(),
        _errors_by_name(list(tasks)),
    ):
        by_name = dict(zip(tasks, workers, strict=True))
        facts = {name: _loaded(by_name[name], task, threads) for name, task in tasks.items()}
        samples_s: dict[str, list[float]] = {
            name: list(earlier[name].samples_s[: rounds_done * length]) if name in earlier else []
            for name in variants
        }

        def so_far() -> dict[str, Measurement]:
            return {
                name: Measurement(
                    name,
                    tuple(times),
                    warmup_runs,
                    settled,
                    threads,
                    round_id,
                    length,
                    facts.get(name),
                    page_faults=live[name].page_faults if name in live else None,
                )
                for name, times in samples_s.items()
                for warmup_runs, settled in [warmups[name]]
            }

        with _no_garbage_collection():
            warmups = {
                name: warm_up(calls[name], warmup)
                if name in calls
                else _warm(by_name[name].ask("warm_up", count=warmup))
                for name in variants
            }
            turns = {name: live.get(name) or by_name[name].turn for name in variants}
            before = this_state()
            for done, rounds, taken in interleave(turns, runs, seed, rounds_done):
                for name, times in taken.items():
                    samples_s[name] += times
                if on_round is not None:
                    on_round(done, rounds)
                if on_partial is not None:
                    on_partial(so_far())
            after = this_state()
        for name, worker in by_name.items():
            facts[name] = replace(facts[name], **worker.ask("memory"))
        earlier_runs = resumed(rounds_done * length)
        return _with_cautions(so_far(), before, after, threads, earlier_runs)


def _with_cautions(
    measured: dict[str, Measurement],
    before: MachineState,
    after: MachineState,
    threads: int,
    others: tuple[Caution, ...],
) -> dict[str, Measurement]:
    """Return the measurements, each with the cautions of the run and its own."""
    import torch

    debug = {"torch": bool(torch.version.debug), "Python": hasattr(sys, "gettotalrefcount")}
    found = cautions_of(
        before,
        after,
        {name: measurement.samples for name, measurement in measured.items()},
        threads,
        debug_build=next((what for what, is_debug in debug.items() if is_debug), None),
    )
    return {
        name: replace(m, cautions=(*(c for c in found if c.name in (None, name)), *others))
        for name, m in measured.items()
    }


def round_id_of(earlier: Mapping[str, Measurement]) -> str:
    """Return the name of the rounds of an interrupted run, to go on with; else a new one."""
    names = {measured.round_id for measured in earlier.values()} - {None}
    return names.pop() or "" if names else secrets.token_hex(8)


def _loaded(worker: Worker, task: "Task", threads: int) -> FileFacts:
    answer = worker.load(task.artifact, str(task.path.resolve()), str(task.folder), threads)
    return file_facts(task.size_bytes, task.sha256, answer)


def file_facts(size_bytes: int, sha256: str, loaded: Mapping[str, Any]) -> FileFacts:
    """Return what a worker told when it had loaded a file; its peak is not known yet."""
    return FileFacts(
        size_bytes,
        sha256,
        loaded["load_s"],
        loaded["first_inference_s"],
        loaded["idle_memory_bytes"],
    )


def _warm(answer: Mapping[str, Any]) -> tuple[int, bool | None]:
    return answer["warmup_runs"], answer["settled"]


@contextlib.contextmanager
def _errors_by_name(names: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except WorkerError as error:
        raise UnsupportedError(
            f"{names[error.index]} ran here, but not in a process of its own: {error}."
        ) from error


def check_counts(
    runs: int, threads: int, warmup: int | None, variants: Mapping[str, object]
) -> None:
    """Raise InputError if there is nothing to measure, or not so."""
    _check_positive(runs=runs, threads=threads)
    if warmup is not None and warmup < 0:
        raise InputError(f"warmup must be zero or more, got {warmup}.")
    if not variants:
        raise InputError("There is nothing to measure; give at least one variant.")


@contextlib.contextmanager
def pinned_threads(count: int) -> Iterator[None]:
    """Run torch, and ExecuTorch where it is loaded, on `count` threads; as before afterwards."""
    import torch

    _check_positive(threads=count)
    before = torch.get_num_threads()
    executorch_before = _executorch_threads()
    torch.set_num_threads(count)
    try:
        _pin_executorch(count)
        yield
    finally:
        torch.set_num_threads(before)
        if executorch_before is not None:
            _pin_executorch(executorch_before)


@contextlib.contextmanager
def _threads_of(models: Iterable[Any], count: int) -> Iterator[None]:
    """Let loaded files run on `count` threads; on as many as before afterwards."""
    before = [(model, model.threads) for model in models]
    try:
        for model, threads in before:
            if threads != count:
                model.set_threads(count)
        yield
    finally:
        for model, threads in before:
            if model.threads != threads:
                model.set_threads(threads)


def _executorch_threads() -> int | None:
    # Importing the runtime takes seconds, and a process that has not done so has no pool to pin.
    if "torchfuse.targets.executorch.program" not in sys.modules:
        return None
    from torchfuse.targets.executorch import program

    return program.threads()


def _pin_executorch(count: int) -> None:
    if _executorch_threads() is not None:
        from torchfuse.targets.executorch import program

        program.set_threads(count)


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InputError(f"{name} must be 1 or more, got {value}.")


def _name(variant: Runnable | str | os.PathLike[str]) -> str:
    if isinstance(variant, (str, os.PathLike)):
        return os.path.basename(variant)
    return getattr(variant, "__name__", type(variant).__name__)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    # As timeit does: a collection in the middle of a call is not the model's time.
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
