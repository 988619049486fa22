"""The modules that a value holds, in whatever way."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["may_hold", "modules_in"]

_DEPTH = 3  # how deep containers, closures and plain objects are entered


def may_hold(value: Any) -> bool:
    """False for what most attributes are: plain values, and tables without an entry."""
    kind = type(value)
    return not (kind in _PLAIN or (kind in (dict, OrderedDict) and not value))


def modules_in(value: Any, depth: int = _DEPTH) -> Iterator[nn.Module]:
    """The modules that a value holds, whatever it is made of: containers, closures, objects.

    The garbage collector knows what each of them refers to; weak references are followed too.
    """
    level, seen = [value], {id(value)}
    for _ in range(3 * depth + 2):  # a function refers to its closure, that to cells, those on
        inner = []
        for entry in level:
            if isinstance(entry, nn.Module):
                yield entry
            elif isinstance(entry, weakref.ref):
                inner.append(entry())
            elif isinstance(entry, FunctionType):
                inner += [entry.__defaults__, entry.__kwdefaults__, entry.__closure__]
            elif not isinstance(entry, _WITHOUT_MODULES):
                inner += gc.get_referents(entry)
        level = []
        for entry in inner:
            if id(entry) not in seen and entry is not None:
                seen.add(id(entry))
                level.append(entry)


_PLAIN = frozenset({bool, int, float, str, type(None)})
# What refers to too much (a class to its module and all that is in it), or to nothing.
_WITHOUT_MODULES = (str, bytes, int, float, type, Tensor, ModuleType, CodeType, FrameType)
