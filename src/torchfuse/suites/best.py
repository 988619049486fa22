"""Of each model on each device: the fastest form of each precision, and the most accurate one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchfuse.comparing.comparison import Row
    from torchfuse.suites.results import SuiteResult

__all__ = ["Best", "best"]


@dataclass(frozen=True)
class Best:
    """What to choose from, of one model on one device."""

    name: str  # of the result
    device: str
    machine: str | None
    baseline: Row
    fastest: dict[str, Row]  # by precision
    most_accurate: Row | None  # the fastest of those; None: accuracy is not known


def best(suite: SuiteResult) -> list[Best]:
    """Return the best forms, in the order of the results."""
    found = []
    for result in suite.results:
        if result.comparison is None:
            continue
        by_device: dict[str, list[Row]] = {}
        for row in result.comparison.rows:
            by_device.setdefault(row.device, []).append(row)
        for device, rows in by_device.items():
            machine = result.machines.get(device)
            found.append(
                Best(result.name, device, machine, rows[0], _fastest(rows), _most_accurate(rows))
            )
    return found


def _fastest(rows: list[Row]) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row.latency.median_s):
        found.setdefault(row.precision, row)
    return {precision: found[precision] for precision in sorted(found, key=_ORDER.index)}


_ORDER = ("fp32", "fp16", "bf16", "int8", "int4")


def _most_accurate(rows: list[Row]) -> Row | None:
    known = [row for row in rows if row.accuracy is not None]
    return min(known, key=lambda r: (-_value(r), r.latency.median_s), default=None)


def _value(row: Row) -> float:
    assert row.accuracy is not None
    return row.accuracy.value
