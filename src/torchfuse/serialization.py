"""Dataclasses as plain data and as JSON, and back: every field, raw samples included.

JSON has no infinity, and what has one (equal outputs have an infinite signal-to-noise ratio) must
still be a number that is above every bound. So ±∞ is the largest number that a double holds,
±1.7976931348623157e308, and is read back as what it was. null is unknown, and nothing else.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from torchfuse.errors import InputError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["from_json", "from_plain", "parsed", "plain", "to_json"]

_T = TypeVar("_T")
_LARGEST = sys.float_info.max


def to_json(result: Any, form: str | None = None) -> str:
    """Return a result, or a list or dict of results, as JSON; `form` becomes its "format"."""
    data = plain(result)
    if form is not None:
        data = {"format": form, **data}
    return json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False)


def plain(result: Any) -> Any:
    """Return a result as what JSON takes: dicts, tuples, strings and finite numbers."""
    return _each_float(msgspec.to_builtins(result, str_keys=True, enc_hook=_plain), _finite)


def from_plain(kind: type[_T], data: Any) -> _T:
    """Return plain data as a dataclass; fields that it does not have are left out.

    Raises:
        ValueError: it is not of that kind; the text says where.
    """
    return msgspec.convert(_each_float(data, _infinite), kind)


def from_json(kind: type[_T], text: str | bytes, form: str | None = None) -> _T:
    """Return the result that `to_json` wrote.

    Raises:
        InputError: it wrote something else, or in another form.
    """
    try:
        if form is not None:
            _require_form(json.loads(text), form)
        return parsed(kind, text)
    except (ValueError, RecursionError) as error:
        named = "" if form is None else f" ({form})"
        raise InputError(
            f"Expected what {kind.__name__}.to_json() writes{named}, got text that is not that "
            f"({first_line(error)}); write it again with this version."
        ) from error


def parsed(kind: type[_T], text: str | bytes) -> _T:
    """Return JSON as a dataclass; fields that it does not have are left out.

    Raises:
        ValueError: it is no JSON, or not of that kind; the text says where.
    """
    return from_plain(kind, json.loads(text))


def _require_form(data: Any, form: str) -> None:
    given = data.get("format") if isinstance(data, dict) else None
    if given != form:
        raise ValueError("it has no format" if given is None else f"its format is {given!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError


def _each_float(value: Any, changed: Callable[[float], float | None]) -> Any:
    if isinstance(value, float):
        return changed(value)
    if isinstance(value, dict):
        return {key: _each_float(item, changed) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_each_float(item, changed) for item in value)
    return value


def _finite(value: float) -> float | None:
    if math.isnan(value):
        return None
    return max(-_LARGEST, min(value, _LARGEST))


def _infinite(value: float) -> float:
    return math.copysign(math.inf, value) if abs(value) == _LARGEST else value
