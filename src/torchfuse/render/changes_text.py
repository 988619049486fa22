"""What changed between two suites or comparisons, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from torchfuse.render.tables import as_text, markdown_row, without_lines
from torchfuse.units import duration, percent, size

if TYPE_CHECKING:
    from torchfuse.suites.changes import Change, Changes

__all__ = ["markdown", "renderable", "text"]

_HEADINGS = ("what", "model", "form", "before", "now", "times as much")
_WORSE = ("slower", "larger", "less accurate")


def text(found: Changes, width: int | None = None) -> str:
    """Return all there is to say as plain text, `width` columns wide; None: no line is wrapped."""
    return as_text(renderable(found), width)


def renderable(found: Changes) -> RenderableType:
    """Return the table and what could not be compared, as rich prints it."""
    shown = without_lines()
    for heading in _HEADINGS:
        shown.add_column(heading, no_wrap=heading != "form")
    for change in found.changes:
        shown.add_row(*_cells(change))
    lines = [Text(line) for line in (_closing(found), *found.notes)]
    return Group(shown, Text(), *lines) if found.changes else Group(*lines)


def markdown(found: Changes) -> str:
    """Return the same as Markdown."""
    table = [
        markdown_row(list(_HEADINGS)),
        f"|{'---|' * len(_HEADINGS)}",
        *(markdown_row(_cells(change)) for change in found.changes),
        "",
    ]
    lines = [_closing(found), "", *(f"- {note}" for note in found.notes)]
    return "\n".join([*(table if found.changes else []), *lines]).rstrip() + "\n"


def _cells(change: Change) -> list[str]:
    if change.kind in ("slower", "faster"):
        values = duration(change.before), duration(change.after, like=change.before)
        ratio = f"{change.after / change.before:.2f} ({change.low:.2f} … {change.high:.2f})"
    elif change.kind in ("larger", "smaller"):
        values = size(int(change.before)), size(int(change.after))
        ratio = f"{change.after / change.before:.3f}"
    else:
        values = percent(change.before), percent(change.after)
        ratio = f"{100 * (change.after - change.before):+.2f} points"
    return [change.kind, change.name, change.form, *values, ratio]


def _closing(found: Changes) -> str:
    worse = sum(change.kind in _WORSE for change in found.changes)
    better = len(found.changes) - worse
    rows = f"{found.compared} row{'' if found.compared == 1 else 's'}"
    if not found.changes:
        return f"Of {rows} that both have, none surely changed."
    return f"Of {rows} that both have, {worse} changes are for the worse, {better} for the better."
