"""The layer and the batch norm of one match: what a function uses of one without the other."""

from __future__ import annotations

import dis
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchfuse.conditions.mentions import BELOW, FACTS, TENSORS, Mention, mentions_of
from torchfuse.conditions.sources import names_in

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FunctionType

    from torchfuse.rules import Match, Subject

__all__ = ["Pair", "delegates"]

_IDENTITY = nn.Identity()
_ANY_CHILD = frozenset({"children", "named_children", "modules", "named_modules", "_modules"})


class Pair:
    """The layer and the batch norm of one match, as paths."""

    def __init__(self, subject: Subject, match: Match) -> None:
        self.subject = subject
        self.first, self.second = self._both = match.modules
        self._children: dict[str, frozenset[str]] = {}
        self._names: dict[str, frozenset[str]] = {}
        self._leading: dict[str, tuple[bool, frozenset[str | None] | None]] = {}

    def names_towards(self, path: str) -> frozenset[str]:
        """Names by which a method of the module at `path` may reach one of the two."""
        known = self._names.get(path)
        if known is None:
            held = {
                name
                for (owner, name), inner in self.subject.held.items()
                if owner == path and any(self._contains(i, p) for i in inner for p in self._both)
            }
            known = self._names[path] = self._towards(path) | held
        return known

    def reached_by(
        self, path: str, function: FunctionType, owner: str | None = None
    ) -> frozenset[str]:
        """What a function uses without the other; it knows the module at `path` as `owner`."""
        mentions = mentions_of(function, owner)
        if mentions is None:
            return self.named_by(path, function)
        both, leading = self._leading_from(path)
        if both and leading is not None:  # most mentions lead to neither
            mentions = tuple(m for m in mentions if not m.chain or m.chain[0] in leading)
        return frozenset(r for m in mentions if (r := self.split(path, m)) is not None)

    def named_by(self, path: str, function: FunctionType) -> frozenset[str]:
        """What it names, where the source of a function cannot be read."""
        names = names_in(function.__code__)
        below = f"{path}." if path else ""
        found = set()
        for inner in self._both:
            if path == inner and names & TENSORS:
                found.add(inner)
            parts = inner.removeprefix(below).split(".") if inner.startswith(below) else []
            named = [part for part in parts if not part.isdigit()]
            indexed = any(
                step.opname.startswith("BINARY_SUBSCR")
                for step in dis.get_instructions(function.__code__)
            )
            if parts and set(named) <= names and (named or indexed):
                found.add(inner)
        return frozenset(found)

    def split(self, path: str, mention: Mention) -> str | None:
        """The path that `mention`, in a function that knows the one at `path`, uses alone."""
        chain = mention.chain
        if not chain:
            return path if path in self._both and mention.usage == "called" else None
        both, leading = self._leading_from(path)
        if both and leading is not None and chain[0] not in leading:
            return None  # it leads to neither: most mentions do
        towards = self._towards(path)
        if both and len(chain) == 1 and len(towards) < 2 and chain[0] in (None, *towards):
            return None  # it leads no further than to a child that holds both
        for reached, rest in self._resolved(path, chain):
            for inner in self._both:
                if reached.startswith(f"{inner}."):  # a part of it, such as a parametrization
                    return reached
            has_first, has_second = (self._contains(reached, p) for p in (self.first, self.second))
            if has_first == has_second or mention.usage == "compared":
                continue
            if not rest:
                return reached
            if rest[0] == "forward":
                return reached
            if rest[0] in TENSORS and not (len(rest) > 1 and rest[1] in FACTS):
                return f"{reached}.{rest[0]}"
            if has_second and reached == self.second and mention.usage == "read":
                return f"{reached}.{rest[0]}"
        return None

    def calls_each_once(self, path: str, function: FunctionType, *, by_name: bool = False) -> bool:
        """Whether all that the method does with the two is to call each in one place.

        With `by_name`, what it reaches by `getattr` is judged elsewhere.
        """
        mentions = mentions_of(function) or ()
        reaching = [m for m in mentions if self.split(path, m) is not None]
        if by_name and not names_in(function.__code__) & _ANY_CHILD:
            reaching = [m for m in reaching if m.chain[:1] != (None,)]
        named = {self.split(path, m) for m in reaching}
        return [m.usage for m in reaching] == ["called", "called"] and len(named) == 2

    def asked_by(self, path: str, function: FunctionType) -> str | None:
        """What a method that ran asks for that is gone or another thing once the pair is folded."""
        norm = type(self.subject.modules[self.second])
        names = names_in(function.__code__)
        asked: list[str] = []
        if names & {"isinstance", "type", "issubclass"}:
            classes = {base.__name__ for base in norm.__mro__ if issubclass(base, _BatchNorm)}
            classes.add(norm.__name__)
            asked = sorted(names & classes)
        if names & {"__class__", "__name__", "__qualname__", "type"}:
            asked += sorted(name for name in names if "batchnorm" in name.lower())
        if asked:
            return f"the class {asked[0]}"
        for mention in mentions_of(function) or ():
            if (asked_for := self.breaks(path, mention)) is not None:
                return f"`{asked_for}`"
        return None

    def breaks(self, path: str, mention: Mention) -> str | None:
        """The attribute that the mention asks for, if folding changes it."""
        for reached, rest in self._resolved(path, mention.chain):
            if not rest:
                continue
            if reached == self.second and not hasattr(_IDENTITY, rest[0]):
                return f"{reached}.{rest[0]}"
            # (What the layer itself does with its bias is judged where it is edited.)
            own = path == self.first
            if reached == self.first and rest[0] == "bias" and self._adds_bias and not own:
                return f"{reached}.bias"
        return None

    def _delegates(self, path: str) -> bool:
        class_: Any = type(self.subject.modules[path])  # mypy takes nn.Module's __hash__ for its
        return delegates(class_)

    def _leading_from(self, path: str) -> tuple[bool, frozenset[str | None] | None]:
        """Whether the module at `path` holds both, and what leads from it to one (None: all)."""
        known = self._leading.get(path)
        if known is None:
            both = self._contains(path, self.first) and self._contains(path, self.second)
            names = (None, BELOW, *self.names_towards(path))
            known = both, None if self._delegates(path) else frozenset(names)
            self._leading[path] = known
        return known

    def _towards(self, path: str) -> frozenset[str]:
        """Names of the children of the module at `path` that hold one of the two, or are it."""
        known = self._children.get(path)
        if known is None:
            below = f"{path}." if path else ""
            known = self._children[path] = frozenset(
                p[len(below) :].split(".")[0]
                for p in (self.first, self.second)
                if p.startswith(below)
            )
        return known

    @property
    def _adds_bias(self) -> bool:
        return getattr(self.subject.modules[self.first], "bias", None) is None

    def _resolved(
        self, path: str, chain: tuple[str | None, ...]
    ) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Modules that the chain leads to, and what of it is left (an attribute of that module)."""
        if not chain:
            return
        name, *rest = chain
        below = f"{path}." if path else ""
        if name == BELOW:
            yield from ((inner, ()) for inner in self._both if self._contains(path, inner))
        elif name is None:
            for child in sorted(self._towards(path)):
                if rest:
                    yield from self._resolved(below + child, tuple(rest))
                else:
                    yield below + child, ()
        elif below + name in self.subject.modules:
            if rest:
                yield from self._resolved(below + name, tuple(rest))
            else:
                yield below + name, ()
        elif (path, name) in self.subject.held:
            for held in self.subject.held[path, name]:
                yield from self._within(held, tuple(rest))
        elif self._delegates(path):
            for child in sorted(self._towards(path)):
                yield from self._resolved(below + child, chain)
                if name.lstrip("-").isdigit():  # an item is no attribute of a child, but a child
                    yield below + child, tuple(entry or "" for entry in rest)
        elif path:
            yield path, tuple(entry or "" for entry in chain)

    def _within(
        self, held: str, rest: tuple[str | None, ...]
    ) -> Iterator[tuple[str, tuple[str, ...]]]:
        """What the rest of a chain leads to from a module in a container or object."""
        below = f"{held}." if held else ""
        for start, name in enumerate(rest):
            if name is not None and below + name in self.subject.modules:
                yield from self._resolved(held, rest[start:])
                return
        yield held, ()

    @staticmethod
    def _contains(path: str, inner: str) -> bool:
        return path == "" or inner == path or inner.startswith(f"{path}.")


@lru_cache(maxsize=4096)
def delegates(class_: Any) -> bool:
    """Whether `self.conv`, `self[0]` may mean any module, found by the class's own methods."""
    if class_.__getattr__ is not nn.Module.__getattr__:
        return True
    found = [getattr(class_, name, None) for name in ("__getitem__", "__iter__")]
    return any(f is not None and not f.__module__.startswith("torch.") for f in found)
