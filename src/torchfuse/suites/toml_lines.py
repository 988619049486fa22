"""Which line of a TOML file a key stands on: its parsers do not say."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["line_of", "lines"]

Key = tuple[str, ...]

_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_DOTTED = rf"{_PART}(?:\s*\.\s*{_PART})*"
_TABLE = re.compile(rf"\s*\[\s*({_DOTTED})\s*\]\s*(?:#.*)?")
_ENTRY = re.compile(rf"\s*({_DOTTED})\s*=(.*)")
_LONG = ('"""', "'''")  # what strings of several lines stand in


def lines(text: str) -> dict[Key, int]:
    r"""Return the line of each table and key of a valid TOML text, counted from 1.

    >>> lines('runs = 5\n[models.net]\nsource = "net.py:build"\n')
    {('runs',): 1, ('models',): 2, ('models', 'net'): 2, ('models', 'net', 'source'): 3}
    """
    found: dict[Key, int] = {}
    table: Key = ()
    inside: str | None = None  # a string of several lines
    for number, line in enumerate(text.splitlines(), 1):
        if inside is not None:
            if inside in line:
                inside = None
            continue
        if match := _TABLE.fullmatch(line):
            table = _parts(match[1])
            _note(found, table, number)
        elif match := _ENTRY.match(line):
            _note(found, (*table, *_parts(match[1])), number)
            inside = next((mark for mark in _LONG if match[2].count(mark) == 1), None)
    return found


def line_of(found: Mapping[Key, int], key: Sequence[str]) -> int:
    """Return the line of a key, or of the innermost table that it belongs in."""
    for length in range(len(key), 0, -1):
        if (number := found.get(tuple(key[:length]))) is not None:
            return number
    return 1


def _parts(dotted: str) -> Key:
    return tuple(part[1:-1] if part[0] in "\"'" else part for part in re.findall(_PART, dotted))


def _note(found: dict[Key, int], key: Key, number: int) -> None:
    for length in range(1, len(key) + 1):
        found.setdefault(key[:length], number)
