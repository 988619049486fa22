"""Profiles beside each other, the most expensive operators first, as text and as Markdown."""

from collections.abc import Sequence

from rich.table import Table

from torchfuse.operator_times import OperatorTime, Profile
from torchfuse.render.tables import markdown_row, without_lines
from torchfuse.units import duration, percent

__all__ = ["lines", "markdown", "table"]

_MOST_EXPENSIVE = 10


def table(profiles: Sequence[Profile], count: int = _MOST_EXPENSIVE) -> Table:
    """Return a line for each of the most expensive operators, and three columns per profile."""
    headings, rows = _cells(profiles, count)
    shown = without_lines()
    shown.add_column(headings[0])
    for heading in headings[1:]:
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(*row)
    return shown


def markdown(profiles: Sequence[Profile], count: int = _MOST_EXPENSIVE) -> str:
    """Return the same table in Markdown."""
    headings, rows = _cells(profiles, count)
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "".join(f"{markdown_row(row)}\n" for row in [headings, rule, *rows])


def lines(
    profiles: Sequence[Profile], count: int = _MOST_EXPENSIVE
) -> list[tuple[str, list[OperatorTime | None]]]:
    """Return the most expensive operators, each with what it is in every profile, and the others.

    None: it is not in that profile.
    """
    by_name = [{_label(row): row for row in profile.operators} for profile in profiles]
    # An operator counts by where it takes longest: gone from one side is what one looks for.
    longest_s: dict[str, float] = {}
    for rows in by_name:
        for label, row in rows.items():
            longest_s[label] = max(row.self_s, longest_s.get(label, 0.0))
    labels = sorted(longest_s, key=lambda label: (-longest_s[label], label))
    found = [(label, [rows.get(label) for rows in by_name]) for label in labels[:count]]
    if others := labels[count:]:
        together = [_together([rows[label] for label in others if label in rows])
                    for rows in by_name]  # fmt: skip
        found.append((f"{len(others)} others", together))
    return found


def _cells(profiles: Sequence[Profile], count: int) -> tuple[list[str], list[list[str]]]:
    headings = ["operator"]
    for profile in profiles:
        headings += [f"{profile.name}\ncalls", "time", "share"]
    cells = [
        [label, *(cell for row in rows for cell in _of_operator(row))]
        for label, rows in lines(profiles, count)
    ]
    cells.append(
        ["a run", *(cell for p in profiles for cell in ("", duration(p.run_s), "100.0 %"))]
    )
    return headings, cells


def _label(row: OperatorTime) -> str:
    if not row.in_delegate:
        return row.operator
    return f"{row.operator} ({row.delegate or 'in a delegate'})"


def _of_operator(row: OperatorTime | None) -> tuple[str, str, str]:
    if row is None:
        return "–", "–", "–"
    return f"{row.calls:g}", duration(row.self_s), percent(row.share, 1)


def _together(rows: Sequence[OperatorTime]) -> OperatorTime | None:
    if not rows:
        return None
    return OperatorTime(
        "",
        sum(row.calls for row in rows),
        sum(row.self_s for row in rows),
        sum(row.share for row in rows),
    )
