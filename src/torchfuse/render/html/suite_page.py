"""A suite as one HTML file that needs no network: the best forms, every form, each model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchfuse.comparing.comparison import LOCAL
from torchfuse.render.comparison_text import (
    answer_lines,
    caution_lines,
    cells,
    closing_sentence,
    delegation_lines,
    headings,
)
from torchfuse.render.html.templates import environment_of_pages, text
from torchfuse.render.libraries import require_libraries
from torchfuse.render.suite_text import best_cells, best_headings, failure_lines
from torchfuse.suites.best import best
from torchfuse.units import decibels, duration, percent, size

if TYPE_CHECKING:
    from torchfuse.comparing.comparison import Comparison, Row
    from torchfuse.suites.results import Result, SuiteResult

__all__ = ["page"]

# The columns of the table of every form; those after the fifth are sorted by numbers.
_COLUMNS = (
    "model", "variant", "target", "precision", "measured on", "median", "speed-up", "size",
    "accuracy", "signal to noise",
)  # fmt: skip
_CHOSEN_BY = ("model", "variant", "target", "precision", "measured on")


def page(suite: SuiteResult) -> str:
    """Return the report: the best forms by model and device, a table of all, and each model.

    Raises:
        UnsupportedError: what makes it is not installed.
    """
    require_libraries()
    found = best(suite)
    rows = [row for result in suite.results for row in _rows(result)]
    template = environment_of_pages().get_template("suite.html.jinja")
    return template.render(
        suite=suite,
        whole=sum(result.is_whole for result in suite.results),
        best_headings=best_headings(found),
        best=[best_cells(each, best_headings(found)) for each in found],
        columns=_COLUMNS,
        chosen_by=[
            (name, list(dict.fromkeys(row[_COLUMNS.index(name)]["text"] for row in rows)))
            for name in _CHOSEN_BY
        ],
        rows=rows,
        headings=headings(),
        sections=[_section(number, result) for number, result in enumerate(suite.results, 1)],
        failures=failure_lines(suite),
        duration=duration,
        css=text("page.css") + text("suite.css"),
        script=text("suite.js"),
    )


def _rows(result: Result) -> list[list[dict[str, Any]]]:
    """Return the cells of the table of every form, each with what it is sorted by."""
    comparison = result.comparison
    if comparison is None:
        return []
    first = {row.device: row for row in reversed(comparison.rows)}
    return [_cells(result, row, row is first[row.device]) for row in comparison.rows]


def _cells(result: Result, row: Row, is_baseline: bool) -> list[dict[str, Any]]:
    words = [result.name, row.variant, row.target, row.precision, _where(result, row.device)]
    accuracy, sqnr_db = row.accuracy, row.difference.sqnr_db
    speed = f"{row.speedup.value:.2f}×" if row.speedup.measurable else "not measurable"
    if is_baseline:
        speed = "baseline"
    numbers: list[tuple[str, float | None]] = [
        (duration(row.latency.median_s), row.latency.median_s),
        (speed, row.speedup.value),
        ("" if row.size_bytes is None else size(row.size_bytes), row.size_bytes),
        ("" if accuracy is None else percent(accuracy.value),
         None if accuracy is None else accuracy.value),
        ("" if sqnr_db is None else "equal" if sqnr_db > _EQUAL_DB else decibels(sqnr_db),
         None if sqnr_db is None else min(sqnr_db, _EQUAL_DB)),
    ]  # fmt: skip
    return [
        *({"text": word, "by": word} for word in words),
        *({"text": text, "by": "" if number is None else repr(number)} for text, number in numbers),
    ]


_EQUAL_DB = 1e6


def _where(result: Result, device: str) -> str:
    """Return the machine or the device that rows were measured on."""
    machine = result.machines.get(device, "")
    return machine if device == LOCAL and machine else f"{device} of {machine}".removesuffix(" of ")


def _section(number: int, result: Result) -> dict[str, Any]:
    found = result.comparison
    return {
        "id": f"model-{number}",
        "result": result,
        "comparison": found,
        "rows": [] if found is None else [_table_row(found, row) for row in found.rows],
        "closing": "" if found is None else closing_sentence(found),
        "lines": [] if found is None else [*answer_lines(found), *delegation_lines(found)],
        "cautions": [] if found is None else caution_lines([found]),
    }


def _table_row(comparison: Comparison, row: Row) -> dict[str, Any]:
    return {"cells": cells(row, row is comparison.baseline), "precision": row.precision}
