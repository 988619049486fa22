"""The measuring loop: how long one call takes, sampled call by call, on pinned threads."""

import contextlib
import gc
import json
import math
import os
import random
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torchfuse.errors import InputError
from torchfuse.stats import Ratio, percentile, ratio_of_medians

__all__ = ["Measurement", "measure", "measure_interleaved", "pinned_threads", "ratio"]

Runnable = Callable[..., Any]
Clock = Callable[[], float]  # seconds since any fixed moment

# Warm-up ends when two windows of calls agree. Lazy initialisation, the allocator and the
# frequency governor take their first few calls; a machine that never settles gets a caution.
_SETTLING_WINDOW = 5
_SETTLED_WITHIN = 0.05
_LONGEST_WARMUP_S = 3.0
_WIDE_SPREAD = 0.1  # of the median

# MobileNetV2 in int8 takes 20 % longer on its first call after another model's; most of that is
# gone after three.
_UNTIMED_IN_A_TURN = 3
_TIMED_IN_A_TURN = 5  # at most
_ROUNDS = 15  # at least, where there are enough runs: they are what an interval is made of


@dataclass(frozen=True)
class Measurement:
    """The time of every single call, in seconds and in the order of the calls."""

    name: str
    samples_s: tuple[float, ...]
    warmup_runs: int
    settled: bool | None  # whether the warm-up ended because the times had; None: not looked at
    threads: int
    round_id: str | None = None  # the same for measurements that were taken in the same rounds
    turn_runs: int = 1  # samples in a row, of which each round has as many

    def __str__(self) -> str:
        """The median with its spread: `net: 1.23 ms (IQR 0.04 ms), 50 runs, threads: 1`."""
        return (
            f"{self.name}: {self.median_s * 1e3:.4g} ms (IQR {self.iqr_s * 1e3:.2g} ms), "
            f"{self.runs} runs, threads: {self.threads}"
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
    def cautions(self) -> tuple[str, ...]:
        """What makes these samples less trustworthy, each with what to change."""
        cautions = []
        if self.settled is False:
            cautions.append(
                f"the times had not settled after {self.warmup_runs} warm-up runs; "
                "close other programs, or give more warm-up runs"
            )
        if self.runs > 1 and self.iqr_s > _WIDE_SPREAD * self.median_s:
            cautions.append(
                f"the middle half of the samples spreads over {self.iqr_s / self.median_s:.0%} of "
                "the median; close other programs, or give more runs"
            )
        return tuple(cautions)

    def to_json(self) -> str:
        """Return this measurement as JSON, every sample included."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Measurement":
        """Return the measurement that `to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "samples_s": tuple(fields["samples_s"])})


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
    on_round: Callable[[int, int], object] | None = None,
    on_partial: Callable[[dict[str, Measurement]], object] | None = None,
) -> dict[str, Measurement]:
    """Return one measurement per variant, all taken in this process, in the same rounds.

    In each round every variant has a turn, in random order, so that what slows the machine down
    for a while slows all of them. A turn is a few calls that are not timed, since the variant
    before has pushed this one's weights out of the caches, and a few that are.

    After every round, `on_round(done, all)` is told, and `on_partial` is given the measurements so
    far, so that a caller can show or save them.

    Raises:
        InputError: no variants, no runs, no threads, or several cases.
        ArtifactError: a file is missing, damaged or of an unknown kind.
    """
    import torch

    from torchfuse.inputs import cases

    _check_positive(runs=runs, threads=threads)
    if warmup is not None and warmup < 0:
        raise InputError(f"warmup must be zero or more, got {warmup}.")
    if not variants:
        raise InputError("There is nothing to measure; give at least one variant.")
    all_cases = cases(inputs)
    if len(all_cases) != 1:
        raise InputError(
            f"A time belongs to one input, got {len(all_cases)} cases; measure each on its own."
        )
    case = all_cases[0]
    with pinned_threads(threads), torch.inference_mode():
        loaded = {name: _runnable(variant) for name, variant in variants.items()}
        _pin_executorch(threads)  # loading an artifact may have brought its runtime in
        calls = {
            name: _timed(runnable, case.args, case.kwargs, clock)
            for name, runnable in loaded.items()
        }
        alone = len(calls) == 1
        round_id = None if alone else secrets.token_hex(8)
        untimed = 0 if alone else _UNTIMED_IN_A_TURN
        turn_runs = 1 if alone else max(1, min(_TIMED_IN_A_TURN, runs // _ROUNDS))
        samples_s: dict[str, list[float]] = {name: [] for name in calls}

        def so_far() -> dict[str, Measurement]:
            return {
                name: Measurement(
                    name, tuple(times), warmup_runs, settled, threads, round_id, turn_runs
                )
                for name, times in samples_s.items()
                for warmup_runs, settled in [warmups[name]]
            }

        with _no_garbage_collection():
            warmups = {name: _warm_up(call, warmup) for name, call in calls.items()}
            order = random.Random(seed)  # noqa: S311  # an order, not a secret
            rounds = math.ceil(runs / turn_runs)
            for done in range(1, rounds + 1):
                for name in order.sample(list(calls), len(calls)):
                    for _ in range(untimed):
                        calls[name]()
                    timed = min(turn_runs, runs - len(samples_s[name]))
                    samples_s[name] += [calls[name]() for _ in range(timed)]
                if on_round is not None:
                    on_round(done, rounds)
                if on_partial is not None:
                    on_partial(so_far())
    return so_far()


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


def _executorch_threads() -> int | None:
    # Importing the runtime takes seconds, and a process that has not done so has no pool to pin.
    if "executorch.extension.pybindings.portable_lib" not in sys.modules:
        return None
    from torchfuse.targets import executorch

    return executorch.threads()


def _pin_executorch(count: int) -> None:
    if _executorch_threads() is not None:
        from torchfuse.targets import executorch

        executorch.set_threads(count)


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InputError(f"{name} must be 1 or more, got {value}.")


def _name(variant: Runnable | str | os.PathLike[str]) -> str:
    if isinstance(variant, (str, os.PathLike)):
        return os.path.basename(variant)
    return getattr(variant, "__name__", type(variant).__name__)


def _runnable(variant: Runnable | str | os.PathLike[str]) -> Runnable:
    if isinstance(variant, (str, os.PathLike)):
        from torchfuse.exporting import load

        loaded: Runnable = load(variant)
        return loaded
    return variant


def _timed(
    runnable: Runnable, args: tuple[Any, ...], kwargs: Mapping[str, Any], clock: Clock
) -> Callable[[], float]:
    def call() -> float:
        start = clock()
        runnable(*args, **kwargs)
        return clock() - start

    return call


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


def _warm_up(call: Callable[[], float], count: int | None) -> tuple[int, bool | None]:
    if count is not None:
        for _ in range(count):
            call()
        return count, None
    times: list[float] = []
    while not _settled(times):
        if sum(times) > _LONGEST_WARMUP_S and len(times) >= 2 * _SETTLING_WINDOW:
            return len(times), False
        times.append(call())
    return len(times), True


def _settled(times: list[float]) -> bool:
    if len(times) < 2 * _SETTLING_WINDOW:
        return False
    before = statistics.median(times[-2 * _SETTLING_WINDOW : -_SETTLING_WINDOW])
    now = statistics.median(times[-_SETTLING_WINDOW:])
    return abs(now - before) <= _SETTLED_WITHIN * before
