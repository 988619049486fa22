"""The few figures that a report opens with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchfuse.comparing.comparison import LOCAL
from torchfuse.units import decibels, duration, percent, size

if TYPE_CHECKING:
    from torchfuse.comparing.comparison import Comparison, Row

__all__ = ["Figure", "figures"]


@dataclass(frozen=True)
class Figure:
    """A figure with what it is, and what it is beside."""

    label: str
    value: str
    beside: str


def figures(comparison: Comparison) -> list[Figure]:
    """Return the fastest form, the smallest file, how it answers, and what was fused."""
    rows = [row for row in comparison.rows if row.device == LOCAL] or list(comparison.rows)
    first = rows[0]
    fastest = min(rows, key=lambda row: row.latency.median_s)
    found = []
    if fastest is not first and fastest.speedup.measurable:
        ratio = fastest.speedup
        found.append(
            Figure(
                "Fastest",
                f"{ratio.value:.2f}×",
                f"{_named(fastest)}: {duration(fastest.latency.median_s)} a call, where "
                f"{_named(first)} takes {duration(first.latency.median_s)}; "
                f"95 % interval {ratio.low:.2f}…{ratio.high:.2f}",
            )
        )
    sized = [row for row in rows if row.size_bytes]
    if len(sized) > 1:
        smallest = min(sized, key=lambda row: row.size_bytes or 0)
        largest = max(sized, key=lambda row: row.size_bytes or 0)
        share = 100 * (smallest.size_bytes or 0) / (largest.size_bytes or 1)
        found.append(
            Figure(
                "Smallest file",
                size(smallest.size_bytes or 0),
                f"{_named(smallest)}: {percent(share / 100, 0)} of {_named(largest)}, "
                f"{size(largest.size_bytes or 0)}",
            )
        )
    if (answer := _answer(fastest, comparison)) is not None:
        found.append(answer)
    if comparison.plan is not None:
        plan = comparison.plan
        done, left = len(plan.fusions), len(plan.skips)
        what = "fusion" if done == 1 else "fusions"
        rest = f"; {left} skipped, each with its reason" if left else ""
        found.append(Figure("Fused", f"{done}", f"{what}, each proven exact{rest}"))
    return found


def _answer(row: Row, comparison: Comparison) -> Figure | None:
    name = _named(row)
    if row.accuracy is not None and comparison.baseline.accuracy is not None:
        points = 100 * (row.accuracy.value - comparison.baseline.accuracy.value)
        interval = ""
        if row.accuracy.low is not None and row.accuracy.high is not None:
            interval = f", 95 % interval {100 * row.accuracy.low:.1f}…{100 * row.accuracy.high:.1f}"
        return Figure(
            "Accuracy of the fastest",
            percent(row.accuracy.value),
            f"{name}: {points:+.2f} points{interval}",
        )
    if row.answers is not None and row.answers.agreement is not None:
        agreement = row.answers.agreement
        return Figure(
            "Same answers",
            percent(agreement.value, 1),
            f"{name}: of {agreement.samples} samples",
        )
    sqnr_db = row.difference.sqnr_db
    if sqnr_db is None:
        return None
    if math.isinf(sqnr_db):
        return Figure("Outputs", "equal", f"{name}, on the example inputs")
    return Figure("Outputs", decibels(sqnr_db), f"{name}: signal to noise, on the example inputs")


def _named(row: Row) -> str:
    return f"{row.precision} {row.target}"
