"""Numbers that tell when code compares them: sizes of tensors, and what is computed of those.

They are `int` and `float` subclasses, so that whoever takes a number takes them. While a
`Listener` is listening, each comparison and truth is one that it may answer otherwise, and it is
told when a number is turned into something that cannot be followed. Else they are plain numbers.

What reads an `int` without asking it (`range`, the index of a list, `math.log2`, a real number on
its left: `0.5 * h`) is not seen here.
"""

from __future__ import annotations

import math
import operator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Listener", "followed", "listening", "plain"]


class Listener(Protocol):
    """Who is asked how a comparison comes out."""

    def truth(self, real: bool) -> bool:
        """The answer to a question whose true answer is `real`."""

    def lose(self, what: str) -> None:
        """A number becomes something that cannot be followed; `what` it becomes, in words."""


_listener: Listener | None = None


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """A context in which `listener` is asked about all numbers that are followed."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def followed(value: Any) -> Any:
    """`value` with the numbers in it followed: one number, or nested tuples and lists of them.

    A `bool` stays one (it has no subclasses): whoever has it to give is asked for it.
    """
    kind = type(value)
    if kind is int:
        return _Size(value)
    if kind is float:
        return _Ratio(value)
    if kind is torch.Size:
        return torch.Size([_Size(size) for size in value])
    if kind in (tuple, list):
        return kind(map(followed, value))
    return value


class _Size(int):
    """A size, or a whole number computed of some."""


class _Ratio(float):
    """A real number computed of sizes."""


def plain(value: Any) -> Any:
    """`value`, as a plain number if it is one that is followed."""
    if isinstance(value, _Size):
        return int.__int__(value)
    if isinstance(value, _Ratio):
        return float.__float__(value)
    return value


def _lose(what: str) -> None:
    if _listener is not None:
        _listener.lose(what)


def _comparing(compare: Callable[[Any, Any], Any]) -> Any:
    def compared(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            if not isinstance(other, (torch.Tensor, type(None), str, tuple, list)):
                _lose(f"compared with a {type(other).__name__}")
            return NotImplemented
        real = compare(plain(self), plain(other))
        return real if _listener is None else _listener.truth(real)

    return compared


def _computing(compute: Callable[..., Any]) -> Any:
    def computed(self: Any, *others: Any) -> Any:
        for other in others:
            if not isinstance(other, (int, float)):
                if not isinstance(other, torch.Tensor):
                    _lose(f"computed with a {type(other).__name__}")
                return NotImplemented
        return followed(compute(plain(self), *map(plain, others)))

    return computed


def _swapped(compute: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda one, other: compute(other, one)


def _truth(self: Any) -> bool:
    real = bool(plain(self))
    return real if _listener is None else _listener.truth(real)


def _leaving(name: str, what: str) -> Any:
    def left(self: Any, *args: Any) -> Any:
        _lose(what)
        return getattr(plain(self), name)(*args)

    return left


_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_BITS = ("and_", "or_", "xor", "lshift", "rshift")
_UNARY = {
    "neg": operator.neg,
    "pos": operator.pos,
    "abs": operator.abs,
    "ceil": math.ceil,
    "floor": math.floor,
    "trunc": math.trunc,
    "round": round,
}
# Python sees to it that what these give back is a plain number. (Text is left out: it is for
# messages, mostly of checks that pass.)
_LEAVING = {
    "__int__": "turned into a plain number",
    "__float__": "turned into a plain number",
    "__index__": "turned into a plain number",
    "__complex__": "turned into a plain number",
    "__hash__": "looked up by its hash",
    "bit_length": "taken apart",
    "bit_count": "taken apart",
    "to_bytes": "taken apart",
    "as_integer_ratio": "taken apart",
    "is_integer": "taken apart",
    "hex": "taken apart",
}


def _define(class_: type) -> None:
    made: dict[str, Any] = {"__bool__": _truth}
    for name in _COMPARISONS:
        made[f"__{name}__"] = _comparing(getattr(operator, name))
    for name in (*_BINARY, *(_BITS if class_ is _Size else ())):
        compute = getattr(operator, name)
        made[f"__{name.strip('_')}__"] = _computing(compute)
        made[f"__r{name.strip('_')}__"] = _computing(_swapped(compute))
    made["__divmod__"] = _computing(divmod)
    made["__rdivmod__"] = _computing(_swapped(divmod))
    unary: Any
    for name, unary in _UNARY.items():
        made[f"__{name}__"] = _computing(unary)
    if class_ is _Size:
        made["__invert__"] = _computing(operator.invert)
    for name, what in _LEAVING.items():
        if hasattr(class_.__mro__[1], name):
            made[name] = _leaving(name, what)
    for name, function in made.items():
        setattr(class_, name, function)


_define(_Size)
_define(_Ratio)
