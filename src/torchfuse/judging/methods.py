"""Whether other methods of the model, or its own code, tell a folded pair from an unfolded one.

A method that reaches the layer without its batch norm (or the other way round) returns something
else once the pair is folded. One that ran in the recording was seen; the others are read here.
"""

from __future__ import annotations

import dis
import inspect
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchfuse.judging.branches import has_other_ways, is_direct
from torchfuse.judging.mentions import BELOW, FACTS, TENSORS, Mention, mentions_of
from torchfuse.judging.sources import descriptors_of, functions_of, is_setup, names_in
from torchfuse.rules import Match, Refusal, Subject

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from types import CodeType, FunctionType

__all__ = ["parts_of_forward", "reached_apart"]


def reached_apart(subject: Subject, match: Match) -> Refusal | None:
    """None if no method reaches one of the two without the other, or asks what folding changes."""
    pair = _Pair(subject, match)
    if (refusal := _reached_by_attached(subject, pair)) is not None:
        return refusal
    for path in _ancestors(match):
        module = subject.modules[path]
        if (refusal := _reached_by_descriptors(path, module, pair)) is not None:
            return refusal
        for function in _methods_of(module).reaching(pair.names_towards(path)):
            ran = _ran(subject, function.__code__, path)
            if ran and (asked := pair.asked_by(path, function)) is not None:
                return Refusal(
                    f"{type(module).__name__}.{function.__name__} asks for {asked}, which folding "
                    "changes.",
                    "Keep what it needs in an attribute of its own.",
                )
            if path and not _is_mentioned(subject, function.__name__):
                continue
            caller = _on_its_own(subject, path, function) if ran else function.__name__
            if caller is None and not has_other_ways(subject, function.__code__):
                continue
            reached = pair.reached_by(path, function)
            if not reached or pair.is_direct(path, function):
                continue
            if caller is None:
                return Refusal(
                    f"{type(module).__name__}.{function.__name__} mentions `{min(reached)}`, and "
                    "branches: on another way it may use it on its own.",
                    "Leave out that use, or give it a layer of its own.",
                )
            if ran and {match.first, match.second} <= reached:
                continue  # recorded with both: what it does with them is in the graph
            how = "a method that can be called by itself" if ran else "which did not run here"
            if caller != function.__name__:
                how = f"which {caller} calls as well"
            return Refusal(
                f"{type(module).__name__}.{function.__name__}, {how}, uses `{min(reached)}` on its "
                "own.",
                "If it is needed, record it too: example_inputs=[…, Case(args, "
                f'method="{caller.rpartition(".")[2]}")]; otherwise remove it.',
            )
    return None


def parts_of_forward(subject: Subject, match: Match) -> Iterator[str]:
    """Public methods of inner modules that return other values, if called from outside the model.

    DenseNet's `bn_function`: its layer's forward calls it, and no other code of the model does.
    """
    pair = _Pair(subject, match)
    for path in filter(None, _ancestors(match)):
        by_name = _methods_of(subject.modules[path]).by_name
        functions = {f for name in pair.names_towards(path) for f in by_name.get(name, ())}
        for function in functions:
            name = function.__name__
            if name.startswith("_") or name == "forward" or pair.is_direct(path, function):
                continue
            reached = pair.reached_by(path, function)
            if reached and not {match.first, match.second} <= reached:
                yield f"{path}.{name}"


def _reached_by_attached(subject: Subject, pair: _Pair) -> Refusal | None:
    """Hooks, and functions in attributes, can be called without a trace in the recorded pass."""
    for entry in subject.attached:
        reached = pair.reached_by(entry.path, entry.function, entry.owner)
        if reached:
            what = "A hook" if entry.is_hook else "The function"
            return Refusal(
                f"{what} in `{entry.where}` uses `{min(reached)}` on its own.",
                "Remove it, or let it read the batch norm's output.",
            )
    return None


def _ran(subject: Subject, code: CodeType, path: str) -> bool:
    """Whether the method with this code ran on the module at `path` in the recorded pass."""
    codes = subject.graph.codes
    if (code, path) in codes:
        return True
    # A call past nn.Module.__call__ (a compiled wrapper) runs, for all we see, in its caller.
    unseen = not subject.graph.module_calls_of(path)
    return unseen and any(known is code for known, _ in codes)


def _on_its_own(
    subject: Subject, path: str, function: FunctionType, seen: frozenset[CodeType] = frozenset()
) -> str | None:
    """Who may run a method that ran without what ran around it; None: nobody.

    Its own name, if it is one of the model itself that anyone may call; else a `Class.method` that
    calls it and did not run, of another module, or that may itself run on its own. How the
    module's own code goes on after it, on other ways, is the question of `branches.py`.
    """
    name = function.__name__
    inherited = False
    if name in ("forward", "__call__"):
        inherited = not _is_own(subject.modules[path], function)
        if not inherited:  # called as the module itself
            return None
    elif _is_public(subject, path, name):
        return name
    seen |= {function.__code__}
    for where, caller in subject.mentions.get(name, ()):
        if caller.__code__ in seen or (inherited and not _calls_super(caller, where == path)):
            continue
        ran = _ran(subject, caller.__code__, where)
        if (
            (not ran and where != path and (not where or _is_mentioned(subject, caller.__name__)))
            or _is_public(subject, where, caller.__name__)
            or ((ran or inherited) and _on_its_own(subject, where, caller, seen) is not None)
        ):
            return f"{type(subject.modules[where]).__name__}.{caller.__name__}"
    return None


def _is_own(module: nn.Module, function: FunctionType) -> bool:
    """Whether calling the module runs this function, and not one that overrides it."""
    own = inspect.unwrap(getattr(type(module), function.__name__))
    return own.__code__ is function.__code__


def _calls_super(caller: FunctionType, same_module: bool) -> bool:
    return same_module and "super" in names_in(caller.__code__)


def _is_public(subject: Subject, path: str, name: str) -> bool:
    """Whether the method is one of the model itself that anyone may call, and not an entry here."""
    entries = {"forward", "__call__", *(case.split("(")[0] for case in subject.graph.cases)}
    return path == "" and not name.startswith("_") and name not in entries


def _is_mentioned(subject: Subject, method: str) -> bool:
    """Whether any code of the model's own classes names the method of an inner module.

    What nothing in the model calls could only be called past the model, from outside.
    """
    return method in ("forward", "__call__") or method in subject.mentions


def _ancestors(match: Match) -> Iterator[str]:
    """Paths of all modules that contain the layer or the batch norm, each once."""
    seen: dict[str, None] = {}
    for path in match.modules:
        while path:
            path = path.rpartition(".")[0]
            seen.setdefault(path)
    return iter(seen)


@dataclass(frozen=True)
class _Methods:
    """Methods of one class and its bases, by the attribute names that they mention."""

    by_name: dict[str, list[FunctionType]]
    dynamic: list[FunctionType]  # may reach any child

    def reaching(self, names: Collection[str]) -> list[FunctionType]:
        found = [f for name in names for f in self.by_name.get(name, ())]
        return list(dict.fromkeys([*found, *self.dynamic]))


_DYNAMIC = frozenset(
    {
        *("children", "named_children", "modules", "named_modules", "get_submodule", "_modules"),
        *("getattr", "__getattr__", "values", "items", "__dict__", "get_parameter"),
    }
)


def _methods_of(module: nn.Module) -> _Methods:
    class_: Any = type(module)  # mypy takes nn.Module's own __hash__ for its class's
    return _methods(class_)


@lru_cache(maxsize=4096)
def _methods(class_: type) -> _Methods:
    by_name: dict[str, list[FunctionType]] = {}
    dynamic: list[FunctionType] = []
    indexed = issubclass(class_, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    indexed = indexed or _delegates(class_)
    for name, function in functions_of(class_):
        if is_setup(name) or (name.startswith("__") and name != "__call__"):
            continue
        names = names_in(function.__code__)
        for mentioned in names:
            by_name.setdefault(mentioned, []).append(function)
        if indexed or names & _DYNAMIC or _hands_self_on(function):
            dynamic.append(function)
    return _Methods(by_name, dynamic)


def _reached_by_descriptors(path: str, module: nn.Module, pair: _Pair) -> Refusal | None:
    """Objects of classes of their own that stand in the module's class in place of a method."""
    class_: Any = type(module)  # as above
    for name, function in descriptors_of(class_):
        if reached := pair.named_by(path, function):
            return Refusal(
                f"{type(module).__name__}.{name}, a {function.__qualname__.rpartition('.')[0]}, "
                f"mentions `{min(reached)}`, and may use it on its own.",
                "Make it a method, or remove it.",
            )
    return None


def _delegates(class_: Any) -> bool:
    """Whether `self.conv`, `self[0]` may mean any module, found by the class's own methods."""
    if class_.__getattr__ is not nn.Module.__getattr__:
        return True
    found = [getattr(class_, name, None) for name in ("__getitem__", "__iter__")]
    return any(f is not None and not f.__module__.startswith("torch.") for f in found)


@lru_cache(maxsize=4096)
def _hands_self_on(function: FunctionType) -> bool:
    mentions = mentions_of(function)
    return any(mention.chain in ((None,), (BELOW,)) for mention in mentions or ())


_IDENTITY = nn.Identity()


class _Pair:
    """The layer and the batch norm of one match, as paths."""

    def __init__(self, subject: Subject, match: Match) -> None:
        self.subject = subject
        self.first, self.second = self._both = match.modules
        self._children: dict[str, frozenset[str]] = {}

    def names_towards(self, path: str) -> frozenset[str]:
        """Names by which a method of the module at `path` may reach one of the two."""
        held = {
            name
            for (owner, name), inner in self.subject.held.items()
            if owner == path and any(self._contains(i, p) for i in inner for p in self._both)
        }
        return self._towards(path) | held

    def reached_by(
        self, path: str, function: FunctionType, owner: str | None = None
    ) -> frozenset[str]:
        """What a function uses without the other; it knows the module at `path` as `owner`."""
        mentions = mentions_of(function, owner)
        if mentions is None:
            return self.named_by(path, function)
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
        both = self._contains(path, self.first) and self._contains(path, self.second)
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

    def is_direct(self, path: str, function: FunctionType) -> bool:
        """Whether the method calls the batch norm right on the layer's output, and does no more."""
        below = f"{path}." if path else ""
        chains = [tuple(inner.removeprefix(below).split(".")) for inner in self._both]
        mentions = mentions_of(function) or ()
        reaching = [m for m in mentions if self.split(path, m) is not None]
        return (
            [m.usage for m in reaching] == ["called", "called"]
            and {m.chain for m in reaching} == set(chains)
            and is_direct(function.__code__, chains[0][-1], chains[1][-1])
        )

    def asked_by(self, path: str, function: FunctionType) -> str | None:
        """What a method that ran asks for that is gone or another thing once the pair is folded."""
        norm = type(self.subject.modules[self.second])
        names = names_in(function.__code__)
        if names & {"isinstance", "type", "issubclass"}:
            classes = {base.__name__ for base in norm.__mro__ if issubclass(base, _BatchNorm)}
            if asked := sorted(names & classes):
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
            if reached == self.first and rest[0] == "bias" and self._adds_bias:
                return f"{reached}.bias"
        return None

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
            for child in self._towards(path):
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
        elif _delegates(type(self.subject.modules[path])):
            for child in self._towards(path):
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
