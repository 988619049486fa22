"""What a machine is doing at one moment: who uses its cores, how fast they go, how hot they are.

Read from the files of a Linux /proc and /sys. What a system does not say is None, never a guess.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = ["FILES", "MachineState", "ThermalZone", "read_files", "state_from", "this_state"]

# The files that a state is made of, relative to the root; cgroup files come on top.
FILES = (
    "proc/uptime",
    "proc/loadavg",
    "proc/stat",
    "proc/[0-9]*/stat",
    "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor",
    "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq",
    "sys/devices/system/cpu/cpu[0-9]*/cpufreq/cpuinfo_max_freq",
    "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count",
    "sys/class/thermal/thermal_zone[0-9]*/type",
    "sys/class/thermal/thermal_zone[0-9]*/temp",
    "sys/class/thermal/thermal_zone[0-9]*/trip_point_[0-9]*_type",
    "sys/class/thermal/thermal_zone[0-9]*/trip_point_[0-9]*_temp",
)
_CGROUP_FILES = ("cpu.max", "cpu.stat", "cpu.cfs_quota_us", "cpu.cfs_period_us")  # of v2, of v1

_MOST_CORES = 8192  # that Linux is built for; a device may say anything

_TICKS_PER_S = 100  # of /proc, on every architecture that Linux still runs on but Alpha


@dataclass(frozen=True)
class ThermalZone:
    """One temperature sensor, and the temperature at which the kernel slows the machine down."""

    name: str
    temperature_c: float
    passive_c: float | None  # None: the kernel does not slow it down, or does not say


@dataclass(frozen=True)
class MachineState:
    """What a machine was doing at one moment. Counters run since it was started; None: unknown.

    Whatever is by core is of the cores that our process may run on, in their order.
    """

    uptime_s: float | None = None
    cores: int | None = None  # that our process may run on
    usable_cores: float | None = None  # the same, but not above the cgroup's quota of CPU time
    load_average: float | None = None  # of the last minute
    busy_s: tuple[float, ...] | None = None  # by core, of all processes
    stolen_s: tuple[float, ...] | None = None  # by core: when the host ran something else
    own_cpu_s: float | None = None  # of our process, and all that it started
    quota_waited_s: float | None = None  # when the cgroup's quota held it back
    governors: tuple[str, ...] | None = None  # by core
    frequencies_hz: tuple[float, ...] | None = None  # by core
    max_frequencies_hz: tuple[float, ...] | None = None  # by core
    thermal_throttles: int | None = None  # how often a core was slowed down because of its heat
    thermal_zones: tuple[ThermalZone, ...] | None = None


def this_state(root: Path = Path("/"), pid: int | None = None) -> MachineState:
    """Return the state of this machine, as the process `pid` (ours, if not given) may use it."""
    pid = os.getpid() if pid is None else pid
    return state_from(read_files(root, pid), pid)


def read_files(root: Path, pid: int) -> dict[str, str]:
    """Return the text of every file that `state_from` needs, by its path relative to `root`."""
    paths = [path for pattern in FILES for path in root.glob(pattern)]
    paths += [root / f"proc/{pid}/status", root / f"proc/{pid}/cgroup"]
    files = dict(_readable(root, paths))
    groups = [root / group for group in _cgroups(files.get(f"proc/{pid}/cgroup", ""))]
    return files | dict(
        _readable(root, [group / name for group in groups for name in _CGROUP_FILES])
    )


def _readable(root: Path, paths: list[Path]) -> Iterator[tuple[str, str]]:
    for path in paths:
        try:
            yield path.relative_to(root).as_posix(), path.read_text(errors="replace")
        except OSError:  # a process that has ended, a sensor that is off
            continue


def _cgroups(text: str) -> list[str]:
    """Return the folders that hold a process's CPU limits, its own and all above it.

    In a container the path may be the host's; then the topmost folder is the container's own.

    >>> _cgroups("0::/user.slice/session")
    ['sys/fs/cgroup', 'sys/fs/cgroup/user.slice', 'sys/fs/cgroup/user.slice/session']
    >>> _cgroups("4:cpuacct,cpu:/box")  # version 1, which has a tree for each controller
    ['sys/fs/cgroup/cpu', 'sys/fs/cgroup/cpu/box']
    """
    folders = []
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "cpu" in controllers.split(","):
            top = PurePosixPath("sys/fs/cgroup", "cpu" if controllers else "")
            own = top / path.lstrip("/")
            above = [folder for folder in own.parents if folder.is_relative_to(top)]
            folders += [*map(str, reversed(above)), str(own)]
    return folders


def state_from(files: Mapping[str, str], pid: int) -> MachineState:
    """Return the state that the texts of these files tell, by their paths relative to the root.

    The process `pid` and all that it started are what is called our own.
    """
    cpus = _allowed_cpus(files.get(f"proc/{pid}/status", ""))
    cores = len(cpus) if cpus else None
    groups = _cgroups(files.get(f"proc/{pid}/cgroup", ""))
    quotas = [quota for group in groups for quota in [_quota(files, group)] if quota is not None]
    busy_s, stolen_s = _core_times(files.get("proc/stat", ""), cpus)
    return MachineState(
        uptime_s=_first_number(files.get("proc/uptime")),
        cores=cores,
        usable_cores=None if cores is None else min([float(cores), *quotas]),
        load_average=_first_number(files.get("proc/loadavg")),
        busy_s=busy_s,
        stolen_s=stolen_s,
        own_cpu_s=_cpu_s_of_tree(files, pid),
        quota_waited_s=_quota_waited_s(files, groups),
        governors=_by_core(files, cpus, "cpufreq/scaling_governor"),
        frequencies_hz=_in_hz(_by_core(files, cpus, "cpufreq/scaling_cur_freq")),
        max_frequencies_hz=_in_hz(_by_core(files, cpus, "cpufreq/cpuinfo_max_freq")),
        thermal_throttles=_throttles(_by_core(files, cpus, "thermal_throttle/core_throttle_count")),
        thermal_zones=_thermal_zones(files),
    )


def _allowed_cpus(status: str) -> list[int]:
    allowed = re.search(r"^Cpus_allowed_list:\s*(\S+)$", status, re.MULTILINE)
    cpus: list[int] = []
    for part in allowed[1].split(",") if allowed else ():
        first, _, last = part.partition("-")
        cpus += range(int(first), min(int(last or first), int(first) + _MOST_CORES) + 1)
    return cpus


def _first_number(text: str | None) -> float | None:
    number = re.match(r"\s*(\d+(\.\d+)?)", text or "")
    return float(number[1]) if number else None


def _core_times(
    stat: str, cpus: list[int]
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return the busy and the stolen seconds of each core."""
    ticks = {
        int(name): [int(value) for value in values.split()]
        for name, values in re.findall(r"^cpu(\d+) ([\d ]+)$", stat, re.MULTILINE)
    }
    if not cpus or any(len(ticks.get(cpu, ())) < 8 for cpu in cpus):  # a core that went offline
        return None, None
    busy, stolen = [], []
    for cpu in cpus:
        user, nice, system, _idle, _iowait, irq, softirq, steal = ticks[cpu][:8]
        busy.append((user + nice + system + irq + softirq) / _TICKS_PER_S)
        stolen.append(steal / _TICKS_PER_S)
    return tuple(busy), tuple(stolen)


def _cpu_s_of_tree(files: Mapping[str, str], pid: int) -> float | None:
    """Return the CPU time of a process, of all that it started, and of those that have ended."""
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for path, text in files.items():
        process = re.fullmatch(r"proc/(\d+)/stat", path)
        if process:
            fields = text.rpartition(")")[2].split()  # a command's name may hold anything
            children.setdefault(int(fields[1]), []).append(int(process[1]))
            ticks[int(process[1])] = sum(map(int, fields[11:15]))  # own and of reaped children
    if pid not in ticks:
        return None
    tree, total = [pid], 0
    while tree:
        member = tree.pop()
        total += ticks[member]
        tree += children.get(member, ())
    return total / _TICKS_PER_S


def _quota(files: Mapping[str, str], group: str) -> float | None:
    """Return how many cores' time a cgroup may use; None: as much as there is."""
    if f"{group}/cpu.max" in files:
        quota, period = files[f"{group}/cpu.max"].split()
    else:
        quota = files.get(f"{group}/cpu.cfs_quota_us", "-1").strip()
        period = files.get(f"{group}/cpu.cfs_period_us", "").strip()
    return None if quota in ("max", "-1") or not period else int(quota) / int(period)


def _quota_waited_s(files: Mapping[str, str], groups: list[str]) -> float | None:
    """Return how long the tightest of the cgroups was held back."""
    waited = []
    for group in groups:
        stat = files.get(f"{group}/cpu.stat", "")
        for unit, pattern in ((1e-6, r"^throttled_usec (\d+)$"), (1e-9, r"^throttled_time (\d+)$")):
            waited += [int(value) * unit for value in re.findall(pattern, stat, re.MULTILINE)]
    return max(waited, default=None)


def _by_core(files: Mapping[str, str], cpus: list[int], name: str) -> tuple[str, ...] | None:
    texts = [files.get(f"sys/devices/system/cpu/cpu{cpu}/{name}") for cpu in cpus]
    known = tuple(text.strip() for text in texts if text is not None)
    return known if known and len(known) == len(cpus) else None


def _in_hz(khz: tuple[str, ...] | None) -> tuple[float, ...] | None:
    if khz is None or not all(text.isdigit() for text in khz):  # "<unknown>" is one of the texts
        return None
    return tuple(int(text) * 1e3 for text in khz)


def _throttles(counts: tuple[str, ...] | None) -> int | None:
    return None if counts is None else sum(map(int, counts))


def _thermal_zones(files: Mapping[str, str]) -> tuple[ThermalZone, ...] | None:
    zones = []
    for path in sorted(files):
        zone = re.fullmatch(r"(sys/class/thermal/thermal_zone\d+)/temp", path)
        temperature_c = _celsius(files[path]) if zone else None
        if zone and temperature_c is not None:
            name = files.get(f"{zone[1]}/type", zone[1].rpartition("/")[2]).strip()
            zones.append(ThermalZone(name, temperature_c, _passive_c(files, zone[1])))
    return tuple(zones) or None


def _passive_c(files: Mapping[str, str], zone: str) -> float | None:
    """Return the lowest temperature at which the kernel slows down what a zone is about."""
    trips = []
    for path, text in files.items():
        trip = re.fullmatch(rf"{re.escape(zone)}/(trip_point_\d+)_type", path)
        if trip and text.strip() == "passive":
            trips.append(_celsius(files.get(f"{zone}/{trip[1]}_temp", "")))
    # A trip point at zero or below is one that is switched off.
    return min((trip for trip in trips if trip is not None and trip > 0), default=None)


def _celsius(millidegrees: str) -> float | None:
    number = re.fullmatch(r"\s*(-?\d+)\s*", millidegrees)
    return int(number[1]) / 1000 if number else None
