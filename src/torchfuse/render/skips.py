"""Skips for the same reason together: a net of fifty blocks has one reason and not fifty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torchfuse.planning import Skip

__all__ = ["SkipGroup", "grouped"]

_ANY = "`…`"


@dataclass(frozen=True)
class SkipGroup:
    """All skips of one rule for one reason."""

    rule: str | None
    reason: str  # with the names of its own modules and blocks left out where there are several
    hint: str
    modules: tuple[tuple[str, ...], ...]


def grouped(skips: Iterable[Skip]) -> list[SkipGroup]:
    """Return the skips by reason, the names of their own modules aside, in their order."""
    found: dict[tuple[str | None, str, str], list[Skip]] = {}
    for skip in skips:
        key = (skip.rule, _without_names(skip.reason, skip), _without_names(skip.hint, skip))
        found.setdefault(key, []).append(skip)
    groups = []
    for (rule, reason, hint), members in found.items():
        first = members[0]
        if all((m.reason, m.hint) == (first.reason, first.hint) for m in members):
            reason, hint = first.reason, first.hint
        groups.append(SkipGroup(rule, reason, hint, tuple(m.modules for m in members)))
    return groups


def _without_names(text: str, skip: Skip) -> str:
    for name in skip.modules:
        parts = name.split(".")
        for count in range(len(parts), 0, -1):  # and the blocks that it is in
            text = text.replace(f"`{'.'.join(parts[:count])}`", _ANY)
    return text
