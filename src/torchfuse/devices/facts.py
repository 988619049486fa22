"""What a device is and how it is: model, processor, memory, system, governor, battery, heat."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torchfuse.devices.printable import printable
from torchfuse.devices.transport import Transport

__all__ = ["DeviceFacts", "facts_of"]


@dataclass(frozen=True)
class DeviceFacts:
    """What a device says of itself; None is what it does not say."""

    name: str  # as --device takes it
    state: str  # "ready", or why it takes no commands
    advice: str | None = None  # what to do about the state
    model: str | None = None
    soc: str | None = None  # or the processor's name
    architecture: str | None = None  # as `uname -m` has it
    cores: int | None = None
    memory_bytes: int | None = None
    system: str | None = None  # the operating system and its version
    governors: tuple[str, ...] = ()  # of the frequency of the cores, each once
    battery_percent: int | None = None
    temperature_c: float | None = None  # of the hottest sensor that is plausible
    instructions: tuple[str, ...] = ()  # those that int8 and fp16 kernels need and that it has
    emulated: bool | None = None  # another processor imitates this one


# Every fact is a line `name=value`, printed by the device's own shell and nothing else.
_SCRIPT = r"""
say() { [ -n "$2" ] && printf '%s=%s\n' "$1" "$2"; }
first() { [ -r "$1" ] && tr -d '\000' <"$1" | head -n 1; }
prop() { command -v getprop >/dev/null 2>&1 && getprop "$1" 2>/dev/null; }
say architecture "$(uname -m)"
say kernel "$(uname -sr)"
unset OMP_NUM_THREADS OMP_THREAD_LIMIT # nproc would print these and not the cores
say cores "$(nproc 2>/dev/null || grep -c '^processor' /proc/cpuinfo 2>/dev/null)"
say memory_kb "$(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo 2>/dev/null)"
say product "$(prop ro.product.manufacturer) $(prop ro.product.model)"
say board "$(first /proc/device-tree/model)"
say dmi "$(first /sys/class/dmi/id/product_name)"
say soc "$(prop ro.soc.manufacturer) $(prop ro.soc.model)"
say hardware "$(prop ro.hardware)"
say android "$(prop ro.build.version.release)"
say sdk "$(prop ro.build.version.sdk)"
say qemu "$(prop ro.kernel.qemu)$(prop ro.boot.qemu)"
say distribution "$(. /etc/os-release 2>/dev/null && echo "$PRETTY_NAME")"
say processor "$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo 2>/dev/null | head -n 1)"
say cpu_hardware "$(sed -n 's/^Hardware[^:]*: *//p' /proc/cpuinfo 2>/dev/null | head -n 1)"
say flags "$(sed -n 's/^\(flags\|Features\)[^:]*: *//p' /proc/cpuinfo 2>/dev/null | head -n 1)"
for f in /sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor; do
  [ -r "$f" ] && say governor "$(cat "$f")"
done
for f in /sys/class/thermal/thermal_zone[0-9]*/temp; do
  [ -r "$f" ] && say millidegrees "$(cat "$f" 2>/dev/null)"
done
say battery "$(command -v dumpsys >/dev/null 2>&1 &&
  dumpsys battery 2>/dev/null | sed -n 's/^ *level: *//p')"
for f in /sys/class/power_supply/*/capacity; do
  [ -r "$f" ] && say battery "$(cat "$f")"
done
:
"""

# Sensors that are off or broken say 0, -273 or 65535.
_PLAUSIBLE_C = (-30.0, 150.0)

# What int8 and fp16 kernels are chosen by.
_INSTRUCTIONS = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_fp16", "amx_int8",
    "asimd", "asimdhp", "asimddp", "i8mm", "sve", "sve2", "sme", "bf16",
)  # fmt: skip

# The first of each that is known.
_MODEL = ("product", "board", "dmi")
_SOC = ("soc", "cpu_hardware", "hardware", "processor")


def facts_of(transport: Transport) -> DeviceFacts:
    """Return what the device says of itself.

    Raises:
        DeviceError: it cannot be reached.
    """
    return facts_from(transport.name, transport.shell(_SCRIPT).stdout)


def facts_from(name: str, printed: str) -> DeviceFacts:
    """Return the facts that the device's shell printed."""
    said: dict[str, list[str]] = {}
    flags: list[str] = []
    for line in printed.splitlines():
        key, equals, value = line.partition("=")
        if equals and key == "flags":
            flags = value.split()
        elif equals and value.strip():
            said.setdefault(key, []).append(printable(value))
    single = {key: values[0] for key, values in said.items()}
    architecture = single.get("architecture")
    android = single.get("android")
    return DeviceFacts(
        name=name,
        state="ready",
        model=_first(single, _MODEL),
        soc=_first(single, _SOC),
        architecture=architecture,
        cores=_number(single.get("cores")),
        memory_bytes=_kilobytes(single.get("memory_kb")),
        system=(
            f"Android {android} (API {single.get('sdk', '?')})"
            if android
            else single.get("distribution") or single.get("kernel")
        ),
        governors=tuple(sorted(set(said.get("governor", ())))),
        battery_percent=_number(single.get("battery")),
        temperature_c=_hottest(said.get("millidegrees", [])),
        instructions=tuple(name for name in _INSTRUCTIONS if name in flags),
        emulated=_is_emulated(architecture, single, flags),
    )


def _first(single: Mapping[str, str], keys: tuple[str, ...]) -> str | None:
    return next((single[key] for key in keys if key in single), None)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"\d{1,18}", text) else None


def _kilobytes(text: str | None) -> int | None:
    number = _number(text)
    return None if number is None else number * 1024


def _hottest(millidegrees: list[str]) -> float | None:
    temperatures = [int(t) / 1000 for t in millidegrees if re.fullmatch(r"-?\d{1,9}", t)]
    low, high = _PLAUSIBLE_C
    return max((t for t in temperatures if low < t < high and t != 0), default=None)


def _is_emulated(
    architecture: str | None, single: Mapping[str, str], flags: list[str]
) -> bool | None:
    """Judge by Android's own word, and by a kernel that describes another processor's parts.

    An emulator of user programs leaves /proc as the host's kernel wrote it.
    """
    if single.get("qemu", "").startswith("1") or single.get("hardware") in ("ranchu", "goldfish"):
        return True
    if architecture is None or not flags:
        return None
    is_arm = architecture.startswith(("aarch64", "arm"))
    describes_x86 = "sse2" in flags
    return is_arm and describes_x86
