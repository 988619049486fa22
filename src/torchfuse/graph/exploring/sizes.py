"""Numbers that tell when code compares them: sizes of tensors, and what is computed of those.

While a `Listener` is listening, each comparison and truth is one that it may answer otherwise, and
it is told when a number is turned into something that cannot be followed. Else they are plain
numbers. They are no subclasses of `int` and `float`, whose values C reads without asking (`range`,
the index of a list, `math.log2`, the other operand in `0.5 * h`), but of torch's symbolic numbers:
torch takes those wherever it takes a number, and others must ask. (Only `type(h) is int` tells.)
"""

from __future__ import annotations

import math
import operator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["BY_HASH", "Listener", "counted", "followed", "listening", "plain"]


class Listener(Protocol):
    """Who is asked how a comparison comes out."""

    def truth(self, real: bool) -> bool:
        """The answer to a question whose true answer is `real`."""

    def lose(self, what: str) -> None:
        """A number becomes something that cannot be followed; `what` it becomes, in words."""

    def text(self, real: str) -> str:
        """A number becomes a text, mostly for a message."""


BY_HASH = "looked up by its hash"  # what becomes of a number that is the key of a cache
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
    # (by the exact type: a bool is an int, and a subclass may have a meaning of its own)
    kind = type(value)
    if kind is int:
        return _Size(value)
    if kind is float:
        return _Ratio(value)
    if kind is torch.Size:
        return torch.Size(map(followed, value))
    if kind in (tuple, list):
        return kind(map(followed, value))
    return value


class _Number:
    """What both kinds have."""

    plain: Any

    def __init__(self, value: Any) -> None:
        self.plain = value

    @property
    def node(self) -> Any:
        """What torch asks for where it computes with the number."""
        return _Node(self.plain)


class _Size(_Number, torch.SymInt):
    """A size, or a whole number computed of some."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # what isinstance is told
        return int


class _Ratio(_Number, torch.SymFloat):
    """A real number computed of sizes."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # as above
        return float


class _Node:
    """A number as torch's symbolic numbers hold it: one whose value is known."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def is_int(self) -> bool:
        return isinstance(self.value, int)

    def is_float(self) -> bool:
        return isinstance(self.value, float)

    def is_bool(self) -> bool:
        return False

    def is_nested_int(self) -> bool:
        return False

    def is_symbolic(self) -> bool:
        return False

    def is_constant(self) -> bool:
        return True

    def constant_int(self) -> int | None:
        return self.maybe_as_int()

    def maybe_as_int(self) -> int | None:
        return self.value if self.is_int() else None

    def guard_int(self, _file: str, _line: int) -> int:
        return int(self.value)

    def guard_float(self, _file: str, _line: int) -> float:
        return float(self.value)

    def int_(self) -> int:
        return int(self.value)


_FOLLOWED = (_Size, _Ratio)
_SIMPLE = frozenset({torch.Tensor, torch.nn.Parameter, int, float, bool, str, type(None)})


class _Parts(tuple[Any, ...]):
    """The parts of a tensor, of which there are more or fewer for another size."""

    __slots__ = ()

    def __len__(self) -> int:
        _lose("counted in parts")
        return super().__len__()


def counted(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """The parts of a tensor, which tell when code counts them."""
    return _Parts(parts)


def plain(value: Any) -> Any:
    """`value`, as a plain number if it is one that is followed; also in tuples, lists, slices."""
    kind = type(value)
    if kind in _SIMPLE:
        return value
    if kind in _FOLLOWED:
        return value.plain
    if kind is slice:
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    if kind is torch.Size:
        return torch.Size(map(plain, value))
    if kind in (tuple, list):
        return kind(map(plain, value))
    if kind is dict:
        return {key: plain(entry) for key, entry in value.items()}
    return value


def _lose(what: str) -> None:
    if _listener is not None:
        _listener.lose(what)


def _comparing(compare: Callable[[Any, Any], Any]) -> Any:
    def compared(self: Any, other: Any) -> Any:
        # An object that compares itself with numbers may branch inside, unseen.
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
# Python sees to it that what these give back is a plain number.
_LEAVING = {
    "__int__": "turned into a plain number",
    "__float__": "turned into a plain number",
    "__index__": "turned into a plain number",
    "__complex__": "turned into a plain number",
    "bit_length": "taken apart",
    "bit_count": "taken apart",
    "to_bytes": "taken apart",
    "as_integer_ratio": "taken apart",
    "is_integer": "taken apart",
    "hex": "taken apart",
}


def _unhashable(self: Any) -> int:
    """What remembers results by their arguments (`lru_cache`) must not remember made-up ones."""
    if _listener is None:
        return hash(plain(self))
    _lose(BY_HASH)
    raise TypeError("A size that is followed has no hash.")


def _text(name: str) -> Any:
    def text(self: Any, *args: Any) -> str:
        real = str(getattr(plain(self), name)(*args))
        return real if _listener is None else _listener.text(real)

    return text


def _define(class_: type, kind: type) -> None:
    made: dict[str, Any] = {"__bool__": _truth, "__hash__": _unhashable}
    made |= {name: _text(name) for name in ("__str__", "__repr__", "__format__")}
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
        if hasattr(kind, name):
            made[name] = _leaving(name, what)
    for name, function in made.items():
        setattr(class_, name, function)


_define(_Size, int)
_define(_Ratio, float)
