"""Whether other methods of the model, or its own code, tell a folded pair from an unfolded one.

A method that reaches the layer without its batch norm (or the other way round) returns something
else once the pair is folded. One that ran in the recording was seen; the others are read here.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchfuse.judging.branches import is_direct
from torchfuse.judging.sources import functions_of, is_setup, names_in, syntax_of
from torchfuse.rules import Match, Refusal, Subject

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType, FunctionType

__all__ = ["reached_apart"]


def reached_apart(subject: Subject, match: Match) -> Refusal | None:
    """None if no method reaches one of the two without the other, or asks what folding changes."""
    pair = _Pair(subject, match)
    for path in _ancestors(match):
        module = subject.modules[path]
        for function in _methods_of(module).reaching(_children_towards(path, match)):
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
            if caller is None:
                continue
            reached = {r for m in _mentions(function) if (r := pair.split(path, m)) is not None}
            if not reached or pair.is_direct(path, function):
                continue
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
    if name in ("forward", "__call__"):  # called as the module itself
        return None
    if _is_public(subject, path, name):
        return name
    seen |= {function.__code__}
    for where, caller in subject.mentions.get(name, ()):
        if caller.__code__ in seen:
            continue
        ran = _ran(subject, caller.__code__, where)
        if (
            (not ran and where != path and (not where or _is_mentioned(subject, caller.__name__)))
            or _is_public(subject, where, caller.__name__)
            or (ran and _on_its_own(subject, where, caller, seen) is not None)
        ):
            return f"{type(subject.modules[where]).__name__}.{caller.__name__}"
    return None


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


def _children_towards(path: str, match: Match) -> set[str]:
    prefix = f"{path}." if path else ""
    return {p[len(prefix) :].split(".")[0] for p in match.modules if p.startswith(prefix)}


@dataclass(frozen=True)
class _Methods:
    """Methods of one class and its bases, by the attribute names that they mention."""

    by_name: dict[str, list[FunctionType]]
    dynamic: list[FunctionType]  # may reach any child

    def reaching(self, names: set[str]) -> list[FunctionType]:
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


def _delegates(class_: Any) -> bool:
    """Whether `self.conv` may mean a module further in, found by the class's own __getattr__."""
    return class_.__getattr__ is not nn.Module.__getattr__


@lru_cache(maxsize=4096)
def _hands_self_on(function: FunctionType) -> bool:
    return any(mention.chain == (None,) for mention in _mentions(function))


@dataclass(frozen=True)
class _Mention:
    """One way in which a method reaches what is below `self`: `self.layers[0].conv(x)`."""

    chain: tuple[str | None, ...]  # ("layers", "0", "conv"); None: any child
    usage: str  # "called", "compared", "read"


@lru_cache(maxsize=4096)
def _mentions(function: FunctionType) -> tuple[_Mention, ...]:
    tree = syntax_of(function.__code__)
    if tree is None or not tree.args.args:
        return ()
    owners = _names_of_self(tree)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    called_names = {
        n.func.id
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    found = (
        _mention(node, parents, called_names)
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id in owners and isinstance(node.ctx, ast.Load)
    )
    return tuple(mention for mention in found if mention is not None)


def _names_of_self(tree: ast.FunctionDef) -> frozenset[str]:
    """`self`, and the names that it is given: `model = self`."""
    names = {tree.args.args[0].arg}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=targets, value=ast.Name(id=known)) if known in names:
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(names)


def _mention(
    node: ast.AST, parents: dict[ast.AST, ast.AST], called_names: set[str]
) -> _Mention | None:
    chain: list[str | None] = []
    while True:
        parent = parents[node]
        if isinstance(parent, ast.Attribute):
            if isinstance(parent.ctx, ast.Store):
                return None
            if parent.attr in ("children", "named_children", "modules", "named_modules"):
                return _dynamic(parent, parents, chain, called_names)
            if parent.attr in ("get_submodule", "_modules", "__dict__"):
                return _dynamic(parent, parents, chain, called_names)
            if parent.attr == "get_parameter":
                return _Mention((*chain, None), "called")
            chain.append(parent.attr)
        elif isinstance(parent, ast.Subscript) and parent.value is node:
            index = parent.slice
            chain.append(str(index.value) if isinstance(index, ast.Constant) else None)
            if chain[-1] is None and isinstance(parents[parent], ast.Call):
                return _Mention(tuple(chain), "called")
        else:
            break
        node = parent
    if not chain and isinstance(parent, _HOLDING):
        return _Mention((None,), "called")  # so is it by whoever takes it out again
    if isinstance(parent, ast.keyword):
        parent = parents[parent]
    if isinstance(parent, ast.Call):
        if parent.func is node:
            return _Mention(tuple(chain), "called")
        name = ast.unparse(parent.func)
        if not chain and name not in _HARMLESS and "init" not in name:
            return _Mention((None,), "called")  # whoever is given the module may reach any child
        if name == "getattr" and not chain and len(parent.args) > 1:
            named = parent.args[1]
            if isinstance(named, ast.Constant) and isinstance(named.value, str):
                return _Mention((named.value,), "called")
            return _dynamic(parent, parents, chain, called_names)
        if name in ("isinstance", "hasattr", "len", "type", "id", "super") or "init" in name:
            return None
        if name in ("enumerate", "zip", "iter", "reversed", "list", "tuple", "next"):
            return _Mention((*chain, None), "called") if called_names else None
    if isinstance(parent, ast.Compare):
        return _Mention(tuple(chain), "compared")
    if isinstance(parent, ast.Delete):
        return None
    if isinstance(parent, (ast.For, ast.comprehension)) and parent.iter is node:
        return _Mention((*chain, None), "called") if called_names else None
    return _Mention(tuple(chain), "read")


def _dynamic(
    node: ast.AST,
    parents: dict[ast.AST, ast.AST],
    chain: list[str | None],
    called_names: set[str],
) -> _Mention | None:
    """Any child may be reached: it counts if what is reached is called."""
    while node in parents:
        parent = parents[node]
        if (
            isinstance(parent, ast.Call)
            and parent.func is node
            and not isinstance(node, ast.Attribute)
        ):
            return _Mention((*chain, None), "called")
        if isinstance(parent, (ast.For, ast.comprehension)):
            targets = {n.id for n in ast.walk(parent.target) if isinstance(n, ast.Name)}
            return _Mention((*chain, None), "called") if targets & called_names else None
        if isinstance(parent, ast.Assign):
            targets = {n.id for t in parent.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            return _Mention((*chain, None), "called") if targets & called_names else None
        node = parent
    return None


_HOLDING = (ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Starred, ast.NamedExpr)
_HARMLESS = frozenset(
    {
        *("isinstance", "hasattr", "len", "type", "id", "super", "getattr", "setattr", "print"),
        *("str", "repr", "callable", "enumerate", "zip", "iter", "reversed", "list", "tuple"),
        *("next", "ValueError", "TypeError", "RuntimeError"),
    }
)
_TENSORS = frozenset({"weight", "bias", "running_mean", "running_var"})
_IDENTITY = nn.Identity()
_FACTS = frozenset({"dtype", "device", "shape", "size", "dim", "numel", "ndim", "requires_grad"})


class _Pair:
    """The layer and the batch norm of one match, as paths."""

    def __init__(self, subject: Subject, match: Match) -> None:
        self.subject = subject
        self.first, self.second = match.modules
        self._children: dict[str, frozenset[str]] = {}

    def split(self, path: str, mention: _Mention) -> str | None:
        """The path that `mention`, in a method of the module at `path`, uses without the other."""
        both = self._contains(path, self.first) and self._contains(path, self.second)
        direct = len(mention.chain) < 2 and not _delegates(type(self.subject.modules[path]))
        if both and direct and len(self._towards(path)) < 2:
            return None  # it leads no further than to a child that holds both
        for reached, rest in self._resolved(path, mention.chain):
            has_first, has_second = (self._contains(reached, p) for p in (self.first, self.second))
            if has_first == has_second or mention.usage == "compared":
                continue
            if not rest:
                return reached
            if rest[0] == "forward":
                return reached
            if rest[0] in _TENSORS and not (len(rest) > 1 and rest[1] in _FACTS):
                return f"{reached}.{rest[0]}"
            if has_second and reached == self.second and mention.usage == "read":
                return f"{reached}.{rest[0]}"
        return None

    def is_direct(self, path: str, function: FunctionType) -> bool:
        """Whether the method calls the batch norm right on the layer's output, and does no more."""
        below = f"{path}." if path else ""
        names = self.first.removeprefix(below), self.second.removeprefix(below)
        reaching = [m for m in _mentions(function) if self.split(path, m) is not None]
        return (
            [m.usage for m in reaching] == ["called", "called"]
            and {m.chain for m in reaching} == {(names[0],), (names[1],)}
            and is_direct(function.__code__, *names)
        )

    def asked_by(self, path: str, function: FunctionType) -> str | None:
        """What a method that ran asks for that is gone or another thing once the pair is folded."""
        norm = type(self.subject.modules[self.second])
        names = names_in(function.__code__)
        if names & {"isinstance", "type", "issubclass"}:
            classes = {base.__name__ for base in norm.__mro__ if issubclass(base, _BatchNorm)}
            if asked := sorted(names & classes):
                return f"the class {asked[0]}"
        for mention in _mentions(function):
            if (asked_for := self.breaks(path, mention)) is not None:
                return f"`{asked_for}`"
        return None

    def breaks(self, path: str, mention: _Mention) -> str | None:
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
        if name is None:
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
        elif _delegates(type(self.subject.modules[path])):
            for child in self._towards(path):
                yield from self._resolved(below + child, chain)
        elif path:
            yield path, tuple(entry or "" for entry in chain)

    @staticmethod
    def _contains(path: str, inner: str) -> bool:
        return path == "" or inner == path or inner.startswith(f"{path}.")
