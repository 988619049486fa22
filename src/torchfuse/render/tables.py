"""What tables have in common: their look in a terminal, as plain text, and in Markdown."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

__all__ = ["as_text", "markdown_row", "without_lines"]

_UNLIMITED = 100_000  # columns: no row is wrapped, so that every row is one line to grep


def without_lines() -> Table:
    """Return an empty table without a box, its headings in bold."""
    return Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))


def as_text(renderable: RenderableType, width: int | None = None) -> str:
    """Return it as plain text, `width` columns wide; None: as wide as its longest row."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=width or _UNLIMITED, color_system=None)
    console.print(renderable)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def markdown_row(cells: Sequence[str]) -> str:
    r"""Return a row of a Markdown table, without a line break.

    >>> print(markdown_row(["a|b", "1.20"]))
    | a\|b | 1.20 |
    """
    escaped = [cell.replace("|", r"\|").replace("\n", " ") for cell in cells]
    return f"| {' | '.join(escaped)} |"
