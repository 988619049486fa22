"""Devices as a table and as one line."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchfuse.devices.facts import DeviceFacts
from torchfuse.render.tables import without_lines
from torchfuse.units import size

__all__ = ["blocks", "described", "show", "table"]

_AS_WIDE_AS_IT_NEEDS = 10_000


def described(device: DeviceFacts) -> str:
    """Return what a device is, in one line: model, processor, system."""
    cores = f"{device.cores} core{'' if device.cores == 1 else 's'}" if device.cores else None
    parts = [device.model, device.soc, device.architecture, cores, device.system]
    known = [part for part in parts if part]
    if device.emulated:
        known.append("emulated")
    return ", ".join(dict.fromkeys(known)) or "nothing known"


def show(devices: Sequence[DeviceFacts]) -> None:
    """Print a table, a line a device; lines one below the other in a terminal too narrow for it."""
    console, shown = Console(), table(devices)
    wide = console.options.update(max_width=_AS_WIDE_AS_IT_NEEDS)
    needed = console.measure(shown, options=wide).maximum
    if console.is_terminal and needed > console.width:
        console.print(Text(blocks(devices)))
    else:
        Console(width=needed).print(shown)


def blocks(devices: Sequence[DeviceFacts]) -> str:
    """Return what the table has, a line a fact."""
    lines = []
    for device in devices:
        name, *cells = _cells(device)
        lines.append(name)
        facts = zip(_COLUMNS[1:], cells, strict=True)
        lines += [f"  {f'{what}:':<11}{cell}" for what, cell in facts if cell]
    return "\n".join(lines)


def table(devices: Sequence[DeviceFacts]) -> Table:
    """Return one row a device; what to do about those that are not ready is not in it."""
    shown = without_lines()
    for name in _COLUMNS:
        is_number = name in ("cores", "memory", "battery", "heat")
        shown.add_column(name, overflow="fold", justify="right" if is_number else "left")
    for device in devices:
        shown.add_row(*map(Text, _cells(device)))  # a name in brackets is no markup
    return shown


_COLUMNS = (
    "device", "state", "model", "processor", "cores", "memory", "system", "governor", "battery",
    "heat",
)  # fmt: skip


def _cells(device: DeviceFacts) -> list[str]:
    processor = ", ".join(part for part in (device.soc, device.architecture) if part)
    return [
        device.name,
        f"{device.state}, emulated" if device.emulated else device.state,
        device.model or "",
        processor,
        "" if device.cores is None else str(device.cores),
        "" if device.memory_bytes is None else size(device.memory_bytes),
        device.system or "",
        ", ".join(device.governors),
        "" if device.battery_percent is None else f"{device.battery_percent} %",
        "" if device.temperature_c is None else f"{device.temperature_c:.0f} °C",
    ]
