"""A machine's state, read from the files of a Linux /proc and /sys."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchfuse.runner.machine_state import (
    MachineState,
    ThermalZone,
    read_files,
    state_from,
    this_state,
)

PID = 700


def stat_line(pid: int, parent: int, *ticks: int, name: str = "python") -> str:
    """A /proc/PID/stat with these user, system, children's user and children's system ticks."""
    utime, stime, cutime, cstime = ticks
    return f"{pid} ({name}) S {parent} 1 1 0 -1 0 0 0 0 0 {utime} {stime} {cutime} {cstime} 20 0 1"


CPU = "sys/devices/system/cpu"
HEAT = "sys/class/thermal"
BOARD = {
    "proc/uptime": "1234.56 4000.00\n",
    "proc/loadavg": "1.25 0.80 0.50 1/200 700\n",
    "proc/stat": "cpu  0 0 0 0 0 0 0 0 0 0\n"
    "cpu0 100 20 30 9000 400 5 6 7 50 0\n"
    "cpu1 200 20 30 9000 400 5 6 8 50 0\n"
    "cpu2 300 20 30 9000 400 5 6 9 50 0\n"
    "intr 12345\n",
    f"proc/{PID}/status": "Name:\tpython\nCpus_allowed:\t7\nCpus_allowed_list:\t0,2\n",
    f"proc/{PID}/cgroup": "0::/box/inner\n",
    f"proc/{PID}/stat": stat_line(PID, 1, 100, 10, 30, 4),
    f"{CPU}/cpu0/cpufreq/scaling_governor": "schedutil\n",
    f"{CPU}/cpu1/cpufreq/scaling_governor": "powersave\n",
    f"{CPU}/cpu2/cpufreq/scaling_governor": "performance\n",
    f"{CPU}/cpu0/cpufreq/scaling_cur_freq": "600000\n",
    f"{CPU}/cpu2/cpufreq/scaling_cur_freq": "1800000\n",
    f"{CPU}/cpu0/cpufreq/cpuinfo_max_freq": "1500000\n",
    f"{CPU}/cpu2/cpufreq/cpuinfo_max_freq": "2400000\n",
    f"{CPU}/cpu0/thermal_throttle/core_throttle_count": "3\n",
    f"{CPU}/cpu2/thermal_throttle/core_throttle_count": "4\n",
    f"{HEAT}/thermal_zone0/type": "cpu-thermal\n",
    f"{HEAT}/thermal_zone0/temp": "61250\n",
    f"{HEAT}/thermal_zone0/trip_point_0_type": "critical\n",
    f"{HEAT}/thermal_zone0/trip_point_0_temp": "50000\n",
    f"{HEAT}/thermal_zone0/trip_point_1_type": "passive\n",
    f"{HEAT}/thermal_zone0/trip_point_1_temp": "85000\n",
    f"{HEAT}/thermal_zone0/trip_point_2_type": "passive\n",
    f"{HEAT}/thermal_zone0/trip_point_2_temp": "80000\n",
    "sys/fs/cgroup/cpu.stat": "usage_usec 5000000\n",
    "sys/fs/cgroup/box/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/box/cpu.stat": "usage_usec 100\nnr_throttled 2\nthrottled_usec 250000\n",
    "sys/fs/cgroup/box/inner/cpu.max": "max 100000\n",
}


def test_everything_is_read_for_the_cores_that_the_process_may_run_on() -> None:
    assert state_from(BOARD, PID) == MachineState(
        uptime_s=1234.56,
        cores=2,
        usable_cores=1.5,
        load_average=1.25,
        busy_s=(1.61, 3.61),
        stolen_s=(0.07, 0.09),
        own_cpu_s=1.44,
        quota_waited_s=0.25,
        governors=("schedutil", "performance"),
        frequencies_hz=(6e8, 1.8e9),
        max_frequencies_hz=(1.5e9, 2.4e9),
        thermal_throttles=7,
        thermal_zones=(ThermalZone("cpu-thermal", 61.25, 80.0),),
    )


def test_the_files_are_found_below_a_root(tmp_path: Path) -> None:
    for path, text in {**BOARD, "proc/not-a-process/stat": "?", "sys/other": "?"}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    unused = {f"{CPU}/cpu1/cpufreq/scaling_governor"}  # found, and not a core of ours
    assert read_files(tmp_path, PID).keys() == BOARD.keys()
    assert unused < BOARD.keys()
    assert this_state(tmp_path, PID) == state_from(BOARD, PID)


def test_a_system_that_says_nothing_is_unknown_in_everything(tmp_path: Path) -> None:
    assert this_state(tmp_path) == MachineState()


@pytest.mark.parametrize("missing", sorted(BOARD))
def test_any_file_may_be_missing(missing: str) -> None:
    complete = state_from(BOARD, PID)
    state = state_from({path: BOARD[path] for path in BOARD if path != missing}, PID)
    for field in complete.__dataclass_fields__:
        value = getattr(state, field)
        assert value is None or type(value) is type(getattr(complete, field))


def test_own_time_is_that_of_all_descendants_and_of_nobody_else() -> None:
    files = {
        **BOARD,
        "proc/701/stat": stat_line(701, PID, 10, 0, 0, 0, name="a ) S 1 (worker"),
        "proc/702/stat": stat_line(702, 701, 0, 5, 0, 0),
        "proc/703/stat": stat_line(703, 1, 9999, 0, 0, 0),
        "proc/1/stat": stat_line(1, 0, 9999, 0, 9999, 0),
    }
    assert state_from(files, PID).own_cpu_s == pytest.approx(1.44 + 0.10 + 0.05)


@pytest.mark.parametrize(
    ("changed", "usable"),
    [
        ({"sys/fs/cgroup/box/cpu.max": "max 100000\n"}, 2.0),
        ({"sys/fs/cgroup/box/inner/cpu.max": "50000 100000\n"}, 0.5),
        ({"sys/fs/cgroup/box/cpu.max": "800000 100000\n"}, 2.0),
        # in a container the process's path is the host's, and the topmost folder the container's
        ({"sys/fs/cgroup/cpu.max": "100000 100000\n", f"proc/{PID}/cgroup": "0::/host/x\n"}, 1.0),
        # version 1
        (
            {
                f"proc/{PID}/cgroup": "5:memory:/box\n4:cpu,cpuacct:/box\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "25000\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
            },
            0.25,
        ),
    ],
)
def test_the_tightest_quota_of_all_cgroups_above_counts(
    changed: dict[str, str], usable: float
) -> None:
    assert state_from({**BOARD, **changed}, PID).usable_cores == usable


def test_time_held_back_is_read_from_version_1_too() -> None:
    files = {
        **BOARD,
        f"proc/{PID}/cgroup": "4:cpu,cpuacct:/\n",
        "sys/fs/cgroup/cpu/cpu.stat": "nr_throttled 3\nthrottled_time 1500000000\n",
    }
    assert state_from(files, PID).quota_waited_s == 1.5


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({f"{CPU}/cpu0/cpufreq/scaling_cur_freq": "<unknown>\n"}, "frequencies_hz"),
        ({f"{HEAT}/thermal_zone0/temp": ""}, "thermal_zones"),
        ({"proc/stat": "cpu0 1 2 3 4 5 6 7 8 9 10\n"}, "busy_s"),
        ({"proc/stat": "cpu0 1 2 3 4\ncpu2 1 2 3 4\n"}, "stolen_s"),
    ],
)
def test_what_cannot_be_read_is_unknown(changed: dict[str, str], field: str) -> None:
    assert getattr(state_from(BOARD, PID), field) is not None
    assert getattr(state_from({**BOARD, **changed}, PID), field) is None


def test_a_trip_point_that_is_switched_off_is_no_limit() -> None:
    files = {**BOARD, f"{HEAT}/thermal_zone0/trip_point_2_temp": "-274000\n"}
    assert state_from(files, PID).thermal_zones == (ThermalZone("cpu-thermal", 61.25, 85.0),)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="has no Linux /proc")
def test_this_machine_counts_the_work_of_a_process_that_we_started() -> None:
    before = this_state()
    # A child that still runs, and one that has ended.
    burn = "import time\nwhile time.process_time() < 0.5: pass\n"
    with subprocess.Popen(
        [sys.executable, "-c", burn + "print('done', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"done\n"
        during = this_state()
        child.communicate(b"\n")
    after = this_state()
    assert before.own_cpu_s is not None
    assert during.own_cpu_s is not None
    assert after.own_cpu_s is not None
    assert during.own_cpu_s - before.own_cpu_s >= 0.45
    assert after.own_cpu_s >= during.own_cpu_s
    assert before.cores == len(os.sched_getaffinity(0))
