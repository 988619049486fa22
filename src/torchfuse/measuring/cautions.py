"""What makes the figures of a run less trustworthy, each with what to change."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from torchfuse.runner.machine_state import MachineState

__all__ = ["Caution", "Kind", "TimedSamples", "cautions", "resumed"]

Kind = Literal[
    "other-load",
    "stolen-time",
    "quota",
    "governor",
    "frequency",
    "thermal",
    "drift",
    "spread",
    "unsettled",
    "page-faults",
    "threads",
    "debug-build",
    "emulated",
    "resumed",
]


@dataclass(frozen=True)
class Caution:
    """One reason to trust figures less."""

    kind: Kind
    text: str  # what is wrong; what to change. Without a full stop
    fails: bool  # whether `--fail-on-noise` gives up on it: it has moved figures, or may well have
    name: str | None = None  # the variant it is about; None: the whole run

    def __str__(self) -> str:
        """The variant, where it is about one, and the sentence."""
        return self.text if self.name is None else f"{self.name}: {self.text}"


@dataclass(frozen=True)
class TimedSamples:
    """The times of one variant in the order they were taken, `turn_runs` in a row each round."""

    times_s: Sequence[float]
    turn_runs: int = 1
    settled: bool | None = None  # whether the times had settled before the first; None: unknown
    warmup_runs: int | None = None
    page_faults: float | None = None  # minor ones in a call, on average (getrusage: ru_minflt)


_OTHERS_USED = 0.05  # of the usable cores' time
_TICK_ERROR_S = 0.02  # the kernel counts a core's time in ticks of 10 ms, at both ends
_STOLEN = 0.01  # of the usable cores' time
_QUOTA_WAITED = 0.01  # of the run's time
_FREQUENCY_MOVED = 0.05

_DRIFTED = 0.03
_MAY_BE_CHANCE = 0.01
_FEWEST_ROUNDS_FOR_A_TREND = 15  # of two times four blocks, any order may be chance
_MOST_BLOCKS_OF_A_THIRD = 10

_WANTED_INTERVAL = 0.02  # on both sides of the median, at 95 %
_FEWEST_ROUNDS = 6  # below, the sign test cannot tell anything at 95 %
_MANY_TIMES_THE_RUNS = 50

_PAGE_FAULT_S = 1e-6  # on the fast side: 0.3 to 5 µs were seen
_FAULTED = 0.02  # of the median


def cautions(
    before: MachineState | None,
    after: MachineState | None,
    samples_by_name: Mapping[str, TimedSamples],
    threads: int,
    *,
    debug_build: str | None = None,
    emulated: bool | None = None,
) -> tuple[Caution, ...]:
    """Return what makes the figures of a run less trustworthy. What is unknown gives no caution.

    `before` is the machine's state after the warm-up, just before the first sample, and `after`
    just after the last one: a core that was asleep has not changed its speed during the run.
    `debug_build` names what was built for debugging ("Python", "torch"). `emulated`: the
    processor is imitated by another.
    """
    before, after = before or MachineState(), after or MachineState()
    of_the_run = (
        _other_load(before, after),
        _stolen_time(before, after),
        _quota(before, after),
        _governor(after),
        _frequency(before, after),
        _thermal(before, after),
        _threads(after, threads),
        _debug_build(debug_build),
        _emulated(emulated),
    )
    of_a_variant: tuple[Callable[[str, TimedSamples], Caution | None], ...] = (
        _unsettled,
        _drift,
        _spread,
        _page_faults,
    )
    found = [
        *of_the_run,
        *(judge(name, s) for name, s in samples_by_name.items() for judge in of_a_variant),
    ]
    return tuple(caution for caution in found if caution is not None)


def _elapsed_s(before: MachineState, after: MachineState) -> float | None:
    if before.uptime_s is None or after.uptime_s is None or after.uptime_s <= before.uptime_s:
        return None
    return after.uptime_s - before.uptime_s


def _core_seconds(
    elapsed_s: float | None,
    before: tuple[float, ...] | None,
    after: tuple[float, ...] | None,
) -> tuple[float, float] | None:
    """Return how much a counter by core has grown, and how much time the cores had."""
    if elapsed_s is None or before is None or after is None or len(before) != len(after):
        return None
    return sum(after) - sum(before), elapsed_s * len(after)


def _other_load(before: MachineState, after: MachineState) -> Caution | None:
    busy = _core_seconds(_elapsed_s(before, after), before.busy_s, after.busy_s)
    if busy is None or before.own_cpu_s is None or after.own_cpu_s is None:
        return _load_average(before)
    busy_s, all_s = busy
    others_s = busy_s - (after.own_cpu_s - before.own_cpu_s)
    surely_s = others_s - _TICK_ERROR_S * len(after.busy_s or ())
    if surely_s <= _OTHERS_USED * all_s:
        return None
    return Caution(
        "other-load",
        f"other programs used {others_s / all_s:.0%} of the time of {_cores(after)} during the "
        "run; close them (`top` shows which they are), or measure when they are done",
        fails=True,
    )


def _load_average(before: MachineState) -> Caution | None:
    """Judge by the load before the run, where a system does not say who used its cores."""
    if before.load_average is None or before.cores is None:
        return None
    if before.load_average <= 0.5 * before.cores:
        return None
    return Caution(
        "other-load",
        f"the load average was {before.load_average:.2f} on {_cores(before)} before the run; close "
        "other programs (`top` shows which they are), or wait for a minute if it was this one",
        fails=True,
    )


def _cores(state: MachineState) -> str:
    return "the one core" if state.cores == 1 else f"the {state.cores} cores"


def _stolen_time(before: MachineState, after: MachineState) -> Caution | None:
    stolen = _core_seconds(_elapsed_s(before, after), before.stolen_s, after.stolen_s)
    if stolen is None:
        return None
    stolen_s, all_s = stolen
    if stolen_s - _TICK_ERROR_S <= _STOLEN * all_s:
        return None
    return Caution(
        "stolen-time",
        f"the host of this virtual machine gave {stolen_s / all_s:.0%} of its cores' time to "
        "others during the run; measure on a machine whose cores are not shared",
        fails=True,
    )


def _quota(before: MachineState, after: MachineState) -> Caution | None:
    elapsed_s = _elapsed_s(before, after)
    if elapsed_s is None or before.quota_waited_s is None or after.quota_waited_s is None:
        return None
    waited = (after.quota_waited_s - before.quota_waited_s) / elapsed_s
    if waited <= _QUOTA_WAITED:
        return None
    return Caution(
        "quota",
        f"the container's quota of CPU time held the run back for {waited:.0%} of it; raise the "
        "quota (docker: --cpus), or give fewer threads",
        fails=True,
    )


def _governor(after: MachineState) -> Caution | None:
    others = sorted({*(after.governors or ())} - {"performance"})
    if not others:
        return None
    return Caution(
        "governor",
        f"the frequency governor is {' and '.join(others)}, so that the cores change their speed "
        "with the load; set it to performance (`sudo cpupower frequency-set -g performance`)",
        fails=False,  # a risk; what came of it shows in the frequency, the drift and the spread
    )


def _frequency(before: MachineState, after: MachineState) -> Caution | None:
    if not before.frequencies_hz or not after.frequencies_hz:
        return None
    first, last = max(before.frequencies_hz), max(after.frequencies_hz)  # of the core that works
    moved = last / first - 1 if first else 0.0
    if abs(moved) <= _FREQUENCY_MOVED:
        return None
    most = max(after.max_frequencies_hz or (0.0,))
    of_at_most = f" (of at most {most / 1e9:.2f} GHz)" if most else ""
    return Caution(
        "frequency",
        f"the fastest core went from {first / 1e9:.2f} to {last / 1e9:.2f} GHz{of_at_most} during "
        "the run; fix the frequency below what the machine can hold (`sudo cpupower frequency-set "
        "-u`), and let it cool",
        fails=True,
    )


def _thermal(before: MachineState, after: MachineState) -> Caution | None:
    if before.thermal_throttles is not None and after.thermal_throttles is not None:
        times = after.thermal_throttles - before.thermal_throttles
        if times > 0:
            return _too_hot(f"cores were slowed down because of their heat, {times}×")
    for zone in after.thermal_zones or ():
        if zone.passive_c is not None and zone.temperature_c >= zone.passive_c:
            return _too_hot(
                f"{zone.name} was at {zone.temperature_c:.0f} °C at the end of the run, and from "
                f"{zone.passive_c:.0f} °C on the machine is slowed down"
            )
    return None


def _too_hot(what: str) -> Caution:
    return Caution(
        "thermal", f"{what}; let it cool, or lower its frequency, and measure again", fails=True
    )


def _threads(after: MachineState, threads: int) -> Caution | None:
    if after.usable_cores is None or threads <= after.usable_cores:
        return None
    return Caution(
        "threads",
        f"there are {threads} threads for {after.usable_cores:g} usable core"
        f"{'' if after.usable_cores == 1 else 's'}, where they wait for each other; give "
        f"{max(1, math.floor(after.usable_cores))} (--threads), or more cores",
        fails=True,
    )


def _debug_build(what: str | None) -> Caution | None:
    if what is None:
        return None
    return Caution(
        "debug-build",
        f"this is a debug build of {what}, which is slower than what users run; install a release "
        "build",
        fails=True,
    )


def _emulated(emulated: bool | None) -> Caution | None:
    if not emulated:
        return None
    return Caution(
        "emulated",
        "the device is emulated: its times say nothing about a real one, not even as ratios; "
        "measure on a real device",
        fails=True,
    )


def resumed(runs_before: int) -> tuple[Caution, ...]:
    """Return the caution that so many runs of each variant are an earlier, interrupted run's."""
    if not runs_before:
        return ()
    return (
        Caution(
            "resumed",
            f"the first {runs_before} runs of each are an earlier run's (--resume), and what the "
            "machine did then is not in these warnings; measure anew where figures must hold",
            fails=False,  # what came of it shows in the drift and the spread
        ),
    )


def _unsettled(name: str, samples: TimedSamples) -> Caution | None:
    if samples.settled is not False:
        return None
    after = "" if samples.warmup_runs is None else f" after {samples.warmup_runs} warm-up runs"
    return Caution(
        "unsettled",
        f"the times had not settled{after}; close other programs, or give more warm-up runs "
        "(--warmup)",
        fails=True,
        name=name,
    )


def _round_medians(samples: TimedSamples) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    times = np.asarray(samples.times_s, dtype=np.float64)
    whole = len(times) // samples.turn_runs * samples.turn_runs
    medians: np.ndarray[tuple[int], np.dtype[np.float64]] = np.median(
        times[:whole].reshape(-1, samples.turn_runs), axis=1
    )
    return medians


def _drift(name: str, samples: TimedSamples) -> Caution | None:
    """Judge by how much the last third differs from the first, unless that may be chance.

    Whether it may be is Mann and Whitney's test, on blocks of rounds: neighbours are alike, which
    the test does not expect.
    """
    rounds = _round_medians(samples)
    if len(rounds) < _FEWEST_ROUNDS_FOR_A_TREND:
        return None
    third = len(rounds) // 3
    drift = float(np.median(rounds[-third:]) / np.median(rounds[:third])) - 1
    if abs(drift) < _DRIFTED:
        return None
    from scipy.stats import mannwhitneyu

    first, last = (
        [np.median(block) for block in np.array_split(part, min(third, _MOST_BLOCKS_OF_A_THIRD))]
        for part in (rounds[:third], rounds[-third:])
    )
    if mannwhitneyu(first, last).pvalue > _MAY_BE_CHANCE:
        return None
    if drift > 0:
        what = "longer"
        advice = "a machine that gets hot slows down: let it cool, or lower its frequency"
    else:
        what = "shorter"
        advice = "it was still warming up: give more warm-up runs (--warmup)"
    return Caution(
        "drift",
        f"the last third of the runs took {abs(drift):.0%} {what} than the first; {advice}, and "
        "close what may have run beside it",
        fails=True,
        name=name,
    )


def _spread(name: str, samples: TimedSamples) -> Caution | None:
    """Judge by the 95 % interval of the median: ± 1.96 · 1.2533 σ / √n, with σ = IQR / 1.349.

    n counts rounds, since runs in a row are alike. Source of the standard error of a median:
    Kendall and Stuart, The Advanced Theory of Statistics, volume 1, section 10.
    """
    rounds = _round_medians(samples)
    low, centre, high = np.percentile(rounds, [25, 50, 75])
    interval_of_one = 1.96 * 1.2533 * (high - low) / 1.349 / centre
    needed = max(_FEWEST_ROUNDS, math.ceil((interval_of_one / _WANTED_INTERVAL) ** 2))
    if needed <= len(rounds):
        return None
    if len(rounds) < _FEWEST_ROUNDS:
        what = f"{len(rounds)} round{'' if len(rounds) == 1 else 's'} of runs say little"
    else:
        what = f"the median is known to ±{interval_of_one / math.sqrt(len(rounds)):.1%} only"
    runs = needed * samples.turn_runs
    if needed > _MANY_TIMES_THE_RUNS * len(rounds):
        advice = "the times spread too far for more runs to help: close other programs first"
    else:
        advice = f"for ±{_WANTED_INTERVAL:.0%} at this spread give about {runs} runs"
    return Caution("spread", f"{what}; {advice}", fails=True, name=name)


def _page_faults(name: str, samples: TimedSamples) -> Caution | None:
    """Judge by what page faults take at least: glibc gives large results back, and maps them anew.

    Whether it does depends on what else the process has allocated, so that the same file takes
    half as long in one process as in another.
    """
    if samples.page_faults is None:
        return None
    if samples.page_faults * _PAGE_FAULT_S <= _FAULTED * float(np.median(samples.times_s)):
        return None
    return Caution(
        "page-faults",
        f"each call has memory mapped anew ({samples.page_faults:.0f} page faults), which takes as "
        "long as the system likes; set MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=1000000000 in "
        "the environment, so that memory is kept",
        fails=False,  # it is what a user's process does too, unless it is told otherwise
        name=name,
    )
