"""What quantizing did, as text: the layers' errors, what recovery gained, accuracy, notes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from torchfuse.quantizing.quantization_report import WITHOUT_RANGES, samples_in_words
from torchfuse.render.tables import as_text
from torchfuse.units import decibels

if TYPE_CHECKING:
    from rich.console import RenderableType

    from torchfuse.quantizing.quantization_report import Accuracy, Calibrated, QuantizationReport

__all__ = ["renderable", "text"]

_WORST = 10
_IN_PERCENT = ("agreement", "top-1")


def text(report: QuantizationReport, width: int | None = None) -> str:
    """Return the report as plain text, `width` columns wide; None: as wide as its longest row."""
    return as_text(renderable(report), width)


def renderable(report: QuantizationReport) -> RenderableType:
    """Return the report as rich prints it."""
    parts: list[RenderableType] = [Text(_headline(report), style="bold")]
    if report.calibrated is not None:
        parts.append(Text(_calibrated(report.calibrated, report.scheme)))
    if report.layers:
        parts += [Text(), _layers(report)]
    if report.recovery:
        parts += [Text(), _recovery(report)]
    parts += [Text(_accuracy(measure)) for measure in report.accuracy]
    if report.in_float:
        parts.append(Text(f"Computed in float: {', '.join(report.in_float)}"))
    parts += [Text(f"Note: {note}") for note in report.notes]
    return Group(*parts)


def _headline(report: QuantizationReport) -> str:
    if report.sqnr_db is None:
        return f"Quantized: {report.scheme}"
    on = ""
    if report.calibrated is not None:
        on = f" on {samples_in_words(report.scheme, report.calibrated.samples)}"
    return f"Quantized: {report.scheme}, outputs at {_decibels(report.sqnr_db)}{on}"


def _accuracy(found: Accuracy) -> str:
    on = "" if found.data is None else f", on {found.data}"
    unit = " %" if found.measure in _IN_PERCENT else ""
    after = f"{found.after:.4g}{unit} after"
    if found.after_low is not None and found.after_high is not None:
        after += f" (95 % interval {found.after_low:.1f} … {found.after_high:.1f})"
    return f"{found.measure}: {found.before:.4g}{unit} before, {after}{on}"


def _calibrated(calibrated: Calibrated, scheme: str) -> str:
    samples = "1 sample" if calibrated.samples == 1 else f"{calibrated.samples} samples"
    if scheme in WITHOUT_RANGES:
        return f"Measured on {calibrated.source}, {samples}"
    growth = calibrated.widest_late_growth
    if calibrated.settled is None or growth is None:
        settled = "too few to tell whether the ranges had settled"
    elif calibrated.settled:
        settled = f"the ranges had settled (the last tenth widened none by more than {growth:.0%})"
    else:
        settled = f"the ranges had not settled: the last tenth still widened one by {growth:.0%}"
    return f"Calibrated on {calibrated.source}, {samples}; {settled}"


def _layers(report: QuantizationReport) -> Table:
    shown = report.layers[:_WORST]
    title = (
        f"The {len(shown)} layers furthest from float, of {len(report.layers)}, on the same data"
    )
    table = _table(title)
    table.add_column("layer", overflow="fold")
    table.add_column("operator", no_wrap=True)
    table.add_column("SQNR", justify="right", no_wrap=True)
    table.add_column("its own", justify="right", no_wrap=True)
    table.add_column("likely cause", overflow="fold")
    for layer in shown:
        table.add_row(
            layer.module or "the model itself",
            layer.operator,
            _decibels(layer.sqnr_db),
            "" if layer.own_sqnr_db is None else _decibels(layer.own_sqnr_db),
            layer.cause,
        )
    return table


def _recovery(report: QuantizationReport) -> Table:
    table = _table("Recovery, by what it gains on the same data")
    table.add_column("step", no_wrap=True)
    table.add_column("outputs before", justify="right", no_wrap=True)
    table.add_column("after", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for step in report.recovery:
        table.add_row(
            step.name,
            _decibels(step.sqnr_db_before),
            _decibels(step.sqnr_db_after),
            "kept" if step.kept else "undone",
            step.note,
        )
    return table


def _table(title: str) -> Table:
    return Table(
        title=title, box=SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold"
    )


def _decibels(value: float) -> str:
    return "exact" if math.isinf(value) and value > 0 else decibels(value)
