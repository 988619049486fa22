"""What makes figures less trustworthy, and what it says to change."""

import subprocess
import sys
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest

from torchfuse.measuring.cautions import Caution, Kind, TimedSamples, cautions, resumed
from torchfuse.runner.machine_state import MachineState, ThermalZone

# Two quiet cores before a run of 10 s, and after it: our process used 9.8 s of one.
BEFORE = MachineState(
    uptime_s=100.0,
    cores=2,
    usable_cores=2.0,
    load_average=0.1,
    busy_s=(50.0, 50.0),
    stolen_s=(0.0, 0.0),
    own_cpu_s=5.0,
    quota_waited_s=1.0,
    governors=("performance", "performance"),
    frequencies_hz=(2.0e9, 1.0e9),
    max_frequencies_hz=(2.4e9, 2.4e9),
    thermal_throttles=3,
    thermal_zones=(ThermalZone("cpu-thermal", 50.0, 80.0),),
)
AFTER = replace(
    BEFORE,
    uptime_s=110.0,
    load_average=1.0,
    busy_s=(59.9, 50.1),
    own_cpu_s=14.8,
    frequencies_hz=(1.0e9, 2.0e9),  # the other core works now
    thermal_zones=(ThermalZone("cpu-thermal", 60.0, 80.0),),
)


def quiet_times(count: int = 50, spread: float = 0.005, seed: int = 0) -> "np.ndarray[Any, Any]":
    return np.random.default_rng(seed).normal(1e-3, 1e-3 * spread, count)


def samples(times_s: Any = None, **fields: Any) -> TimedSamples:
    return TimedSamples(tuple(quiet_times() if times_s is None else times_s), **fields)


def found(
    before: MachineState | None = BEFORE,
    after: MachineState | None = AFTER,
    times: TimedSamples | None = None,
    threads: int = 1,
    **flags: Any,
) -> tuple[Caution, ...]:
    return cautions(before, after, {"net": times or samples()}, threads, **flags)


def test_a_quiet_run_has_nothing_to_say() -> None:
    assert found(threads=2, debug_build=None, emulated=False) == ()


@pytest.mark.parametrize("state", [None, MachineState()])
def test_what_is_unknown_gives_no_caution(state: MachineState | None) -> None:
    assert found(state, state, threads=64) == ()
    assert found(BEFORE, state) == ()


# what is changed → the caution's kind, what it says, whether --fail-on-noise gives up
RUNS: list[tuple[dict[str, Any], str, str, bool]] = [
    (
        {"after": replace(AFTER, busy_s=(59.9, 59.0))},
        "other-load",
        "other programs used 46% of the time of the 2 cores during the run; close them (`top` "
        "shows which they are), or measure when they are done",
        True,
    ),
    (
        {
            "before": replace(BEFORE, own_cpu_s=None, load_average=1.8),
            "after": replace(AFTER, busy_s=None),
        },
        "other-load",
        "the load average was 1.80 on the 2 cores before the run; close other programs (`top` "
        "shows which they are), or wait for a minute if it was this one",
        True,
    ),
    (
        {"after": replace(AFTER, stolen_s=(1.0, 0.5))},
        "stolen-time",
        "the host of this virtual machine gave 8% of its cores' time to others during the run; "
        "measure on a machine whose cores are not shared",
        True,
    ),
    (
        {"after": replace(AFTER, quota_waited_s=3.0)},
        "quota",
        "the container's quota of CPU time held the run back for 20% of it; raise the quota "
        "(docker: --cpus), or give fewer threads",
        True,
    ),
    (
        {"after": replace(AFTER, governors=("schedutil", "performance"))},
        "governor",
        "the frequency governor is schedutil, so that the cores change their speed with the load; "
        "set it to performance (`sudo cpupower frequency-set -g performance`)",
        False,
    ),
    (
        {"after": replace(AFTER, frequencies_hz=(1.2e9, 1.0e9))},
        "frequency",
        "the fastest core went from 2.00 to 1.20 GHz (of at most 2.40 GHz) during the run; fix the "
        "frequency below what the machine can hold (`sudo cpupower frequency-set -u`), and let it "
        "cool",
        True,
    ),
    (
        {"after": replace(AFTER, thermal_throttles=5)},
        "thermal",
        "cores were slowed down because of their heat, 2×; let it cool, or lower its frequency, "
        "and measure again",
        True,
    ),
    (
        {"after": replace(AFTER, thermal_zones=(ThermalZone("cpu-thermal", 81.5, 80.0),))},
        "thermal",
        "cpu-thermal was at 82 °C at the end of the run, and from 80 °C on the machine is slowed "
        "down; let it cool, or lower its frequency, and measure again",
        True,
    ),
    (
        {"threads": 3},
        "threads",
        "there are 3 threads for 2 usable cores, where they wait for each other; give 2 "
        "(--threads), or more cores",
        True,
    ),
    (
        {"threads": 2, "after": replace(AFTER, usable_cores=0.5)},
        "threads",
        "there are 2 threads for 0.5 usable cores, where they wait for each other; give 1 "
        "(--threads), or more cores",
        True,
    ),
    (
        {"debug_build": "Python"},
        "debug-build",
        "this is a debug build of Python, which is slower than what users run; install a release "
        "build",
        True,
    ),
    (
        {"emulated": True},
        "emulated",
        "the device is emulated: its times say nothing about a real one, not even as ratios; "
        "measure on a real device",
        True,
    ),
]


@pytest.mark.parametrize(("changed", "kind", "text", "fails"), RUNS)
def test_a_run_that_is_cautioned_about(
    changed: dict[str, Any], kind: Kind, text: str, fails: bool
) -> None:
    assert found(**changed) == (Caution(kind, text, fails),)


# the times → the caution's kind and what it says; all but page faults fail
TIMES: list[tuple[TimedSamples, str, str]] = [
    (
        samples(settled=False, warmup_runs=300),
        "unsettled",
        "the times had not settled after 300 warm-up runs; close other programs, or give more "
        "warm-up runs (--warmup)",
    ),
    (
        samples(settled=False),
        "unsettled",
        "the times had not settled; close other programs, or give more warm-up runs (--warmup)",
    ),
    (
        samples(quiet_times() * np.linspace(1, 1.1, 50)),
        "drift",
        "the last third of the runs took 8% longer than the first; a machine that gets hot slows "
        "down: let it cool, or lower its frequency, and close what may have run beside it",
    ),
    (
        samples(quiet_times() * np.where(np.arange(50) < 15, 1.05, 1)),
        "drift",
        "the last third of the runs took 4% shorter than the first; it was still warming up: give "
        "more warm-up runs (--warmup), and close what may have run beside it",
    ),
    (
        samples(quiet_times(spread=0.1, seed=1)),
        "spread",
        "the median is known to ±2.6% only; for ±2% at this spread give about 87 runs",
    ),
    (
        samples(np.repeat(quiet_times(8, spread=0.1), 5), turn_runs=5),
        "spread",
        "the median is known to ±4.2% only; for ±2% at this spread give about 180 runs",
    ),
    (
        samples([1e-3, 1.001e-3]),
        "spread",
        "2 rounds of runs say little; for ±2% at this spread give about 6 runs",
    ),
    (
        samples([1e-3], turn_runs=1),
        "spread",
        "1 round of runs say little; for ±2% at this spread give about 6 runs",
    ),
    (
        samples([1e-3, 9e-3] * 5),
        "spread",
        "the median is known to ±92.1% only; the times spread too far for more runs to help: close "
        "other programs first",
    ),
    (
        samples(page_faults=25.4),  # of calls of 1 ms
        "page-faults",
        "each call has memory mapped anew (25 page faults), which takes as long as the system "
        "likes; set MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=1000000000 in the environment, "
        "so that memory is kept",
    ),
]


@pytest.mark.parametrize(("times", "kind", "text"), TIMES)
def test_times_that_are_cautioned_about(times: TimedSamples, kind: Kind, text: str) -> None:
    (caution,) = found(times=times)
    assert caution == Caution(kind, text, kind != "page-faults", "net")
    assert str(caution) == f"net: {text}"


def test_every_kind_has_a_case_here() -> None:
    others = {caution.kind for caution in resumed(6)}
    shown = {kind for _, kind, *_ in RUNS} | {kind for _, kind, _ in TIMES} | others
    assert shown == {*get_args(Kind)}


def test_runs_of_an_earlier_run_are_said_to_be_and_are_no_noise() -> None:
    (caution,) = resumed(6)
    assert str(caution).startswith("the first 6 runs of each are an earlier run's (--resume)")
    assert (caution.fails, resumed(0)) == (False, ())


def test_our_own_work_is_no_other_load() -> None:
    busy = replace(AFTER, busy_s=(60.0, 60.0), own_cpu_s=24.9)  # all of it ours
    assert found(after=busy) == ()


def test_a_run_too_short_for_the_kernels_ticks_is_not_judged_by_them() -> None:
    # 30 ms in which one core has counted three ticks more than we used.
    after = replace(AFTER, uptime_s=100.03, busy_s=(50.03, 50.0), own_cpu_s=5.0)
    assert found(after=after) == ()


def test_a_load_average_before_the_run_is_no_matter_where_the_cores_time_is_known() -> None:
    assert found(before=replace(BEFORE, load_average=9.0)) == ()


def test_noise_without_a_trend_is_rarely_taken_for_drift() -> None:
    taken = [
        cautions(None, None, {"net": samples(quiet_times(60, spread=0.05, seed=seed))}, 1)
        for seed in range(300)
    ]
    assert sum(c.kind == "drift" for run in taken for c in run) <= 6  # 2 %


def test_one_slow_run_in_ten_is_no_drift() -> None:
    times = quiet_times(50)
    times[45:] *= 3
    assert found(times=samples(times)) == ()


def test_the_runs_that_a_caution_asks_for_are_enough() -> None:
    spread = 0.05
    errors = []
    for seed in range(1000):  # 38 runs are what is asked for at this spread
        times = quiet_times(38, spread=spread, seed=seed)
        errors.append(abs(float(np.median(times)) / 1e-3 - 1))
    assert np.mean(np.array(errors) <= 0.02) == pytest.approx(0.95, abs=0.02)


def test_a_few_page_faults_are_no_matter() -> None:
    assert found(times=samples(page_faults=19.0)) == ()


def test_each_variant_is_judged_by_itself() -> None:
    quiet, unsettled = samples(), samples(settled=False)
    assert [
        (c.kind, c.name) for c in cautions(None, None, {"quiet": quiet, "loud": unsettled}, 1)
    ] == [("unsettled", "loud")]


def test_it_is_judged_without_torch() -> None:
    code = (
        "import sys; from torchfuse.measuring.cautions import TimedSamples, cautions; "
        "from torchfuse.runner.machine_state import this_state; "
        "cautions(this_state(), this_state(), {'net': TimedSamples((1.0, 2.0) * 20)}, 1); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
