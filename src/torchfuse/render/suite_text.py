"""A suite as a table of the best forms of each model, with what failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from torchfuse.comparing.comparison import LOCAL
from torchfuse.render.tables import as_text, markdown_row, without_lines
from torchfuse.suites.best import best
from torchfuse.units import duration, percent, size

if TYPE_CHECKING:
    from torchfuse.comparing.comparison import Row
    from torchfuse.suites.best import Best
    from torchfuse.suites.results import SuiteResult

__all__ = ["best_cells", "best_headings", "failure_lines", "markdown", "renderable", "text"]

_LEGEND = (
    "The fastest form of each precision, beside the first row of the same device; the most "
    "accurate one is the fastest of those."
)


def text(suite: SuiteResult, width: int | None = None) -> str:
    """Return all there is to say as plain text, `width` columns wide; None: no line is wrapped."""
    return as_text(renderable(suite), width)


def renderable(suite: SuiteResult) -> RenderableType:
    """Return the table, what failed and where it was measured, as rich prints it."""
    found = best(suite)
    shown = without_lines()
    for heading in best_headings(found):
        shown.add_column(heading)
    last = ""
    for each in found:
        cells = best_cells(each, best_headings(found))
        shown.add_row(*(["" if each.name == last else cells[0], *cells[1:]]))
        last = each.name
    lines = [Text(_LEGEND), Text(), *(Text(line) for line in _lines(suite))]
    return Group(shown, *lines) if found else Group(*(Text(line) for line in _lines(suite)))


def markdown(suite: SuiteResult) -> str:
    """Return the same as Markdown."""
    found = best(suite)
    headings = best_headings(found)
    table = [
        markdown_row(headings),
        f"|{'---|' * len(headings)}",
        *(markdown_row(best_cells(each, headings)) for each in found),
        "",
        _LEGEND,
        "",
    ]
    lines = [f"- {line}" for line in _lines(suite)]
    return "\n".join([*(table if found else []), *lines]).rstrip() + "\n"


def best_headings(found: list[Best]) -> list[str]:
    """Return the headings of the table of the best."""
    precisions = dict.fromkeys(precision for each in found for precision in each.fastest)
    accurate = ["most accurate"] if any(each.most_accurate for each in found) else []
    return ["model", "measured on", *(f"fastest {p}" for p in precisions), *accurate]


def best_cells(each: Best, headings: list[str]) -> list[str]:
    """Return what the table says of one model and device."""
    where = f"{each.device} of {each.machine}" if each.device != LOCAL else each.machine
    cells = [each.name, where or each.device]
    for heading in headings[2:]:
        row = each.most_accurate
        if heading.startswith("fastest "):
            row = each.fastest.get(heading.removeprefix("fastest "))
        cells.append("" if row is None else _cell(row, each.baseline, heading))
    return cells


def _cell(row: Row, baseline: Row, heading: str) -> str:
    if heading == "most accurate":
        assert row.accuracy is not None
        return f"{row.precision} {row.target} {percent(row.accuracy.value)}"
    speed = "" if row is baseline else f" {row.speedup.value:.2f}×"
    if row is not baseline and not row.speedup.measurable:
        speed = ""
    weight = "" if row.size_bytes is None else f" {size(row.size_bytes)}"
    return f"{row.target} {duration(row.latency.median_s)}{speed}{weight}"


def failure_lines(suite: SuiteResult) -> list[str]:
    """Return a sentence for each thing that could not be done."""
    return [
        f"{result.name}, {failure.what}: {failure.reason.rstrip('.')}."
        for result in suite.results
        for failure in result.failures
    ]


def _lines(suite: SuiteResult) -> list[str]:
    whole = sum(result.is_whole for result in suite.results)
    workers = ", ".join(
        f"{name} ({count} worker{'' if count == 1 else 's'})"
        for name, count in suite.machines.items()
    )
    on = f", on {workers}" if workers else ""
    took = "" if suite.took_s is None else f" in {suite.took_s:.0f} s"
    first = f"{whole} of {len(suite.results)} comparisons are whole{on}{took}."
    unfinished = ["It was interrupted."] if suite.unfinished else []
    failed = [f"Not done: {line}" for line in failure_lines(suite)]
    return [first, *unfinished, *failed, *suite.refused]
