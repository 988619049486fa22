"""A comparison as a table, with a closing sentence on what fusing and quantizing bought."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from torchfuse.comparing.comparison import (
    FOLDED,
    LOCAL,
    NOT_FUSED,
    ChangedAnswer,
    Comparison,
    Row,
    gain,
)
from torchfuse.render.tables import as_text, markdown_row, without_lines
from torchfuse.stats import Ratio, Share
from torchfuse.units import decibels, duration, percent, size

if TYPE_CHECKING:
    from torchfuse.measuring.cautions import Caution

__all__ = [
    "answer_lines",
    "caution_lines",
    "cells",
    "closing_sentence",
    "delegation_lines",
    "headings",
    "lead",
    "legend",
    "markdown",
    "renderable",
    "table",
    "text",
]

Pairs = list[tuple[str, Row | None, Row | None]]  # where, before, after

_HEADINGS = ("median", "IQR", "speed-up", "size", "differs by", "accuracy")
_LEGEND = (
    "Speed-ups are over the first row of each device; in brackets are 95 % intervals; IQR is the "
    "range of the middle half of the times. Differences are from the first row's outputs, on the "
    "example inputs: the largest over the largest output, or in dB, signal to noise."
)
_FOLDED_LEGEND = (
    " Folded by lowering: what makes such a file folds batch norms itself, so that there is none "
    "that is not fused."
)


def text(comparison: Comparison, width: int | None = None) -> str:
    """Return all there is to say as plain text, `width` columns wide; None: no line is wrapped."""
    lines = [as_text(renderable([comparison]), width), *caution_lines([comparison])]
    return "\n".join(lines)


def renderable(comparisons: Sequence[Comparison]) -> RenderableType:
    """Return all but the cautions, as rich prints it."""
    parts: list[RenderableType] = [table(comparisons), Text(legend(comparisons))]
    for comparison in comparisons:
        parts += [Text(), Text(closing_sentence(comparison))]
    parts.append(Text())
    for comparison in comparisons:
        # Of one alone it is known which is meant.
        name = "" if len(comparisons) == 1 else f", {comparison.model}"
        lines = [*answer_lines(comparison), *delegation_lines(comparison)]
        parts += [Text(f"{name[2:]}: {line}" if name else line) for line in lines]
        parts += [Text(f"Note{name}: {note}") for note in comparison.notes]
    return Group(*parts)


def legend(comparisons: Sequence[Comparison]) -> str:
    """Return what the words of the table mean."""
    folded = any(row.variant == FOLDED for c in comparisons for row in c.rows)
    return _LEGEND + (_FOLDED_LEGEND if folded else "")


def caution_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """Return what makes the times less trustworthy, a line for each kind, as `bench` shows it."""
    lines = []
    for comparison in comparisons:
        where = "" if len(comparisons) == 1 else f"{comparison.model}: "
        by_kind: dict[tuple[str, bool], list[Caution]] = {}
        for caution in comparison.cautions:
            by_kind.setdefault((caution.kind, caution.name is None), []).append(caution)
        for first, *others in by_kind.values():
            rows = "row" if len(others) == 1 else "rows"
            more = f" (and {len(others)} more {rows})" if others else ""
            name = "" if first.name is None else f"{first.name}{more}: "
            lines.append(f"Warning: {where}{name}{first.text}.")
    return lines


def markdown(comparison: Comparison) -> str:
    """Return all there is to say as Markdown."""
    lines = [
        markdown_row(headings()),
        f"|---|---|{'---:|' * len(_HEADINGS)}",
        *(
            markdown_row([cell.strip() for cell in cells(row, row is comparison.baseline)])
            for row in comparison.rows
        ),
    ]
    more = [
        *answer_lines(comparison),
        *delegation_lines(comparison),
        *comparison.notes,
        *caution_lines([comparison]),
    ]
    closing = [legend([comparison]), "", closing_sentence(comparison)]
    return "\n".join([*lines, "", *closing, "", *(f"- {line}" for line in more)]).rstrip() + "\n"


def headings() -> list[str]:
    """Return the headings of the table."""
    return ["variant", "target", *_HEADINGS]


def table(comparisons: Sequence[Comparison]) -> Table:
    """Return one table with a section per model; the first row of a section is its baseline."""
    shown = without_lines()
    for heading in ("variant", "target"):
        shown.add_column(heading, no_wrap=True)
    for heading in _HEADINGS:
        shown.add_column(heading, justify="right", no_wrap=True)
    for comparison in comparisons:
        shown.add_row(Text(comparison.model, style="bold"))
        for row in comparison.rows:
            shown.add_row(*cells(row, row is comparison.baseline))
        shown.add_section()
    return shown


def cells(row: Row, is_baseline: bool) -> list[str]:
    """Return what the table says of a row, a cell under each of `headings`."""
    return [
        f" {row.variant}",
        f"{row.target} {row.precision}" + ("" if row.device == LOCAL else f" on {row.device}"),
        duration(row.latency.median_s),
        duration(row.latency.iqr_s),
        "baseline" if is_baseline else _times(row.speedup),
        "" if row.size_bytes is None else size(row.size_bytes),
        "" if is_baseline else _difference(row),
        "" if row.accuracy is None else _share(row.accuracy),
    ]


def _times(ratio: Ratio) -> str:
    if not ratio.measurable:
        return "not measurable"
    return f"{ratio.value:.2f}× ({ratio.low:.2f}…{ratio.high:.2f})"


def _share(share: Share) -> str:
    if share.low is None or share.high is None:
        return percent(share.value)
    return f"{percent(share.value, 1)} ({100 * share.low:.0f}…{100 * share.high:.0f})"


def _difference(row: Row) -> str:
    found = row.difference
    if found.max_rel is None or found.sqnr_db is None:
        return "–"
    # What was judged by its noise is shown by it: one large difference in int8 says little.
    by_noise = found.min_sqnr_db is not None and math.isfinite(found.sqnr_db)
    return decibels(found.sqnr_db) if by_noise else f"{found.max_rel:.1e}"


def closing_sentence(comparison: Comparison) -> str:
    """Return what fusing and what quantizing bought, each as a ratio between two rows."""
    # What holds for one kind of processor need not for another: phones have their own kernels.
    where = "" if comparison.architecture is None else f", on {comparison.architecture}"
    fused, quantized = _pairs(comparison)
    return f"{comparison.model}{where}: fusing {_bought(fused)}; quantizing {_bought(quantized)}."


def lead(comparison: Comparison) -> str:
    """Return the same in fewer words, without intervals, to open a report with."""
    fused, quantized = _pairs(comparison)
    where = "" if comparison.architecture is None else f", on {comparison.architecture}"
    text = f"Fusing {_said(fused)}; quantizing {_said(quantized)}{where}."
    changes = [
        100 * (after.accuracy.value - before.accuracy.value)
        for _, before, after in (*fused, *quantized)
        if before and after and before.accuracy is not None and after.accuracy is not None
    ]
    if not changes:
        return text
    worst = min(changes)
    if all(abs(change) < _SHOWN_POINTS for change in changes):
        return f"{text} Accuracy stayed as it was."
    return f"{text} Accuracy changed by {worst:+.2f} points at worst."


_SHOWN_POINTS = 0.005


def _said(pairs: Pairs) -> str:
    said = []
    for place, before, after in pairs:
        if not before or not after:
            continue
        speed = gain(before, after)
        text = f"{speed.value:.2f}× as fast" if speed.measurable else "no faster or slower"
        size = ""
        if before.size_bytes and after.size_bytes and before.precision != after.precision:
            size = f" at {percent(after.size_bytes / before.size_bytes, 0)} of the size"
        said.append(f"{text} in {place}{size}")
    return f"made it {' and '.join(said)}" if said else "was not compared"


def _pairs(comparison: Comparison) -> tuple[Pairs, Pairs]:
    """Return the rows before and after fusing, and before and after quantizing, by place."""
    fused = [
        (
            place,
            comparison.find(NOT_FUSED, target, "fp32"),
            comparison.find("fused", target, "fp32"),
        )
        for place, target in (("eager mode", "eager"), ("TorchScript", ".pt"))
    ]
    quantized = [
        (place, comparison.find(variant, target, "fp32"), comparison.find(variant, target, "int8"))
        for place, variant, target in (
            ("ExecuTorch", FOLDED, ".pte"),
            ("ONNX Runtime", FOLDED, ".onnx"),
            ("OpenVINO", FOLDED, ".xml"),
            ("AOTInductor", FOLDED, ".aoti.pt2"),
            ("TorchScript", "fused", ".pt"),
        )
    ]
    return fused, quantized


def _bought(pairs: Pairs) -> str:
    gains = [_gain(place, before, after) for place, before, after in pairs if before and after]
    return " and ".join(gains) or "was not compared"


def _gain(place: str, before: Row, after: Row) -> str:
    more = []
    if before.size_bytes and after.size_bytes and before.precision != after.precision:
        more.append(f"{percent(after.size_bytes / before.size_bytes, 0)} of the size")
    if before.accuracy is not None and after.accuracy is not None:
        points = 100 * (after.accuracy.value - before.accuracy.value)
        more.append(f"{points:+.2f} points of accuracy")
    speed = gain(before, after)
    if not speed.measurable:
        text = "made no measurable difference"
    elif speed.value > 1:
        text = f"made it {_times(speed)} as fast"
    else:
        text = f"made it slower, {_times(speed)} as fast,"
    return f"{text} in {place}" + (f" ({', '.join(more)})" if more else "")


def answer_lines(comparison: Comparison) -> list[str]:
    """Return what the answers are on, and for each row whose answers changed, which."""
    if comparison.validation is None:
        return []
    what = ""
    if comparison.accuracy_of is not None:
        is_known = any(row.accuracy is not None for row in comparison.rows)
        what = f" Accuracy is {comparison.accuracy_of}." if is_known else _NO_SCORES
    lines = [f"Answers are compared on {comparison.validation}.{what}"]
    same = []
    for row in comparison.rows:
        answers = row.answers
        if answers is None or row is comparison.baseline or row.device != LOCAL:
            continue
        name = f"{row.variant}, {row.precision} {row.target}"
        if answers.agreement is None:
            if answers.sqnr_db is not None and math.isfinite(answers.sqnr_db):
                lines.append(f"{name}: outputs at {decibels(answers.sqnr_db)}.")
        elif not answers.changed:
            same.append(name)
        else:
            shown = "; ".join(_changed(change) for change in answers.changed[:_MOST_CHANGES])
            more = len(answers.changed) - _MOST_CHANGES
            lines.append(
                f"{name}: the same answer for {answers.agreement}; changed: {shown}"
                + (f"; and {more} more." if more > 0 else ".")
            )
    if same:
        rows = "every other row" if len(lines) > 1 else "every row"
        lines.append(f"{rows[0].upper()}{rows[1:]}: no answer changed.")
    return lines


def _changed(change: ChangedAnswer) -> str:
    label = "" if change.label is None else f", which is {change.label}"
    return f"{change.sample} ({change.before} → {change.after}{label})"


_MOST_CHANGES = 3
_NO_SCORES = (
    " There are labels, but accuracy is not known: the outputs are not one tensor of scores, "
    "[samples, classes]; give --evaluate."
)


def delegation_lines(comparison: Comparison) -> list[str]:
    """Return, for each row with a delegate, how much of the model it runs."""
    lines = []
    for row in comparison.rows:
        if row.delegation is not None and row.device == LOCAL:
            share = row.delegation.macs_share
            macs = "" if share is None else f"{percent(share, 1)} of the multiply-accumulates and "
            calls = row.delegation.calls_delegated + row.delegation.calls_left
            lines.append(
                f"{row.precision} {row.target}: {row.delegation.delegate} runs {macs}"
                f"{row.delegation.calls_delegated} of {calls} operator calls."
            )
    return lines
