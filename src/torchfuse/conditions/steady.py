"""Branches that go by what a model is made of, such as `if self.norm is not None`.

They come out the same at every call, whatever exploring lost, unless a call may write what they ask
for. That is read in the source: no value tells who may write it.
"""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import sys
from collections import Counter, defaultdict
from enum import Enum
from functools import lru_cache
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from torchfuse.conditions.attached import functions_in
from torchfuse.conditions.sources import functions_of, is_setup, names_in, syntax_of
from torchfuse.isolation.held_modules import may_hold

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torchfuse.graph import Graph

__all__ = ["Steady"]

# An attribute of these is what it is until it is written. (A list or an object may change inside.)
_WHOLE = (bool, int, float, str, bytes, type(None), type, Enum, nn.Module, FunctionType)
# Containers that change only where code names them.
_ENTRIES = (dict, list, set, frozenset, tuple)
# What torch's own modules give of what they hold.
_CHILDREN = frozenset({"items", "keys", "values", "children", "named_children"})
# What changes what they hold.
_REGISTERING = frozenset({"add_module", "register_module", "_modules"})
_CHANGING = frozenset(
    {
        *("append", "clear", "extend", "insert", "pop", "popitem", "setdefault", "update"),
        *("__setitem__", "__delitem__"),
    }
)
_ANY_CHILD = frozenset({"*"})
_BELOW = frozenset({"children", "named_children", "modules", "named_modules", "get_submodule"})
# Builtins that give what they are given, or a part of it.
_PICKING = frozenset(
    {"enumerate", "iter", "list", "next", "reversed", "sorted", "tuple", "zip", "filter"}
)
# Builtins that answer from what they are given.
_ANSWERING = frozenset({"isinstance", "hasattr", "callable", "enumerate", "zip", "range"})
# What writes an attribute of a module whose name no instruction tells: past the recording, or as
# the recording sees where it runs.
_UNSEEN = frozenset({"__dict__", "vars", "exec"})
_BY_NAME = frozenset({"setattr", "__setattr__", "delattr", "__delattr__"})


_NOT_THE_USERS = sys.stdlib_module_names | {"torch"}


class Steady:
    """The attributes of a model that no call changes."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        graphs: Sequence[Graph],
        attached: Iterable[FunctionType],
    ) -> None:
        self.functions: dict[CodeType, FunctionType] = {f.__code__: f for f in attached}
        self.owners: dict[CodeType, list[nn.Module]] = {}
        self.of_objects: set[CodeType] = set()  # the methods of what is no module
        self._decided: dict[CodeType, bool] = {}
        by_name: dict[str, list[CodeType]] = {}
        for module in modules.values():
            for name, value in vars(module).items():
                if not may_hold(value):
                    continue
                held = [function.__code__ for function in self._add(value)]
                by_name.setdefault(name, []).extend(c for c in held if c not in self.of_objects)
            class_: Any = type(module)  # mypy takes nn.Module's own __hash__ for its class's
            for _, function in functions_of(class_):
                self.functions[function.__code__] = function
                self.owners.setdefault(function.__code__, []).append(module)
        self.written = {name for graph in graphs for name in graph.changed | graph.written}
        self.any_written = False
        self.children_written = False
        self.naming: Counter[str] = Counter()  # functions that a call may come to, by names in them
        self.filled: set[str] = set()  # what a call may put something into, or take it out of
        self.names: dict[int, set[str]] = {}  # of each module
        for path, module in modules.items():
            # (of `self.stages[0]` no more is known than that it is of `stages`)
            around = {f".{name}" for name in path.split(".")}
            self.names.setdefault(id(module), {*_ANY_CHILD}).update(around)
        recorded = {code for graph in graphs for code, _ in graph.codes}
        running = list(self._may_run(recorded, by_name))
        filling = defaultdict[str, set[int | str]](set)  # arguments of functions, by their names
        for code in running:
            for number, name in enumerate(_arguments_of(code)):
                filling[code.co_name] |= {number, name} if name in _filled(code) else set()
        for code in running:
            self.filled |= _filled(code)
            for callee, place, given in _handed(code):
                self.filled |= given if place in filling[callee] else set()
            self.written |= _stored(code)
            self.naming.update(names_in(code))
            if not {"train", "eval"}.isdisjoint(code.co_names):
                self.written.add("training")
            if code in self.functions and code not in self.of_objects:
                unnamed = _UNSEEN if code in recorded else _UNSEEN | _BY_NAME
                self.any_written |= not unnamed.isdisjoint(names_in(code))
                self.children_written |= not _REGISTERING.isdisjoint(names_in(code))

    def _add(self, value: Any) -> list[FunctionType]:
        """Notes the functions that a value is, holds or has as methods, and gives them."""
        kind: Any = type(value)
        found = [function for function, _ in functions_in(value)]
        if not isinstance(value, (FunctionType, nn.Module)) and _is_of_users(kind):
            methods = [function for _, function in functions_of(kind)]
            self.of_objects |= {method.__code__ for method in methods}
            found += methods
        found = list(filter(_is_of_users, found))
        self.functions |= {function.__code__: function for function in found}
        return found

    def decides(self, code: CodeType) -> bool:
        """Whether each branch of a method goes by such attributes; False if there is no source."""
        if code not in self._decided:
            self._decided[code] = self._decides(code)
        return self._decided[code]

    def _decides(self, code: CodeType) -> bool:
        tree = syntax_of(code)
        if self.any_written or code not in self.owners or tree is None or not tree.args.args:
            return False
        owner = tree.args.args[0].arg
        return all(
            isinstance(asked, ast.expr) and self._is_same(asked, code, owner)
            for node in ast.walk(tree)
            for asked in _asked(node, owner)
        )

    def _is_same(self, value: ast.expr, code: CodeType, owner: str) -> bool:
        """Whether an expression in that method has the same value at every call."""
        if isinstance(value, (ast.Constant, ast.BoolOp, ast.Tuple, ast.Compare, ast.UnaryOp)):
            parts = [part for part in ast.iter_child_nodes(value) if isinstance(part, ast.expr)]
            return all(self._is_same(part, code, owner) for part in parts)
        if isinstance(value, ast.Call):
            named = value.func.id if isinstance(value.func, ast.Name) else None
            given = (*value.args, *(keyword.value for keyword in value.keywords))
            if isinstance(value.func, ast.Attribute) and not given:
                return self._are_children(value.func, code, owner)
            return named in _ANSWERING and all(self._is_same(v, code, owner) for v in given)
        names: list[str] = []
        while isinstance(value, ast.Attribute):
            names.insert(0, value.attr)
            value = value.value
        if not isinstance(value, ast.Name):
            return False
        if value.id == owner:
            return self.written.isdisjoint(names) and all(
                _is_whole(module, names) or self._is_only_asked(module, names, code)
                for module in self.owners[code]
            )
        if not names and (over := _looped_over(code, value.id)) is not None:
            return self._is_same(over, code, owner)
        space = self.functions[code].__globals__
        known: Any = space.get(value.id, getattr(builtins, value.id, None))
        for name in names:
            known = inspect.getattr_static(known, name, None)
        return isinstance(known, type) and value.id not in code.co_varnames

    def _are_children(self, method: ast.Attribute, code: CodeType, owner: str) -> bool:
        """`self.items()`, as torch's own containers answer, of children that no call changes."""
        if not (isinstance(method.value, ast.Name) and method.value.id == owner):
            return False
        owners = self.owners[code]
        classes: set[Any] = {type(module) for module in owners}
        return (
            method.attr in _CHILDREN
            and not self.children_written
            and all(self.filled.isdisjoint(self.names[id(module)]) for module in owners)
            and all(
                getattr(class_, method.attr).__module__.startswith("torch.nn.")
                and not any(
                    not _filled(function.__code__).isdisjoint(_arguments_of(function.__code__)[:1])
                    for _, function in functions_of(class_)
                )
                for class_ in classes
            )
        )

    def _is_only_asked(self, module: nn.Module, names: list[str], code: CodeType) -> bool:
        """`name in self.kept`: a container that no code but this names, which only looks into it.

        Nobody can change what nobody names.
        """
        tree = syntax_of(code)
        if tree is None or len(names) != 1 or self.naming[names[0]] != 1:
            return False
        value: Any = vars(module).get(names[0])
        if type(value) not in _ENTRIES or not all(isinstance(entry, _WHOLE) for entry in value):
            return False
        asked = [
            part
            for node in ast.walk(tree)
            for part in (
                node.comparators
                if isinstance(node, ast.Compare)
                else [node.value]
                if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load)
                else []
            )
        ]
        uses = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == names[0]]
        return all(any(use is part for part in asked) for use in uses)

    def _may_run(
        self, recorded: Iterable[CodeType], by_name: dict[str, list[CodeType]]
    ) -> Iterator[CodeType]:
        """The functions that a call may come to, by the names in those that it did come to."""
        for code, function in self.functions.items():
            if not is_setup(function.__name__):
                by_name.setdefault(function.__name__, []).append(code)
        waiting = [*recorded, *by_name.get("forward", ())]
        seen: set[CodeType] = set()
        while waiting:
            code = waiting.pop()
            if code in seen:
                continue
            seen.add(code)
            yield code
            if code in self.of_objects:
                continue  # names in those of a library's objects lead anywhere
            space = self.functions[code].__globals__ if code in self.functions else {}
            names = names_in(code)
            for name in names:
                waiting += by_name.get(name, ())
                value = space.get(name)
                if isinstance(value, (type, ModuleType)):
                    continue
                for function in self._add(inspect.unwrap(value) if callable(value) else value):
                    if function.__code__ not in self.of_objects or function.__name__ in names:
                        waiting.append(function.__code__)


def _is_of_users(defined: Any) -> bool:
    """Whether a class or a function is neither Python's own nor torch's."""
    return (defined.__module__ or "").partition(".")[0] not in _NOT_THE_USERS


def _asked(node: ast.AST, owner: str) -> Iterator[ast.AST]:
    """What a branch goes by; a node that is no expression where that cannot be told."""
    if isinstance(node, (ast.If, ast.IfExp)):
        yield node.test
    elif isinstance(node, ast.BoolOp):
        yield from node.values[:-1]
    elif isinstance(node, ast.Compare) and len(node.ops) > 1:
        yield node
    elif isinstance(node, ast.For):
        yield node.iter
    elif isinstance(node, ast.comprehension):
        yield from (node.iter, *node.ifs)
    elif isinstance(node, (ast.Try, ast.Match, ast.While, ast.AsyncFor)) or (
        isinstance(node, ast.Name) and node.id == owner and not isinstance(node.ctx, ast.Load)
    ):
        yield node.ctx if isinstance(node, ast.Name) else node


def _looped_over(code: CodeType, name: str) -> ast.expr | None:
    """What a local name is taken from, in the one loop that sets it; None if anything else does."""
    tree = syntax_of(code)
    nodes = [] if tree is None else list(ast.walk(tree))
    stores = [n for n in nodes if isinstance(n, ast.Name) and n.id == name]
    stores = [n for n in stores if not isinstance(n.ctx, ast.Load)]
    loops = [
        node.iter
        for node in nodes
        if isinstance(node, ast.For) and any(n in stores for n in ast.walk(node.target))
    ]
    given = any(isinstance(node, ast.arg) and node.arg == name for node in nodes)
    return loops[0] if len(stores) == len(loops) == 1 and not given else None


@lru_cache(maxsize=8192)
def _filled(code: CodeType) -> frozenset[str]:
    """What a function puts something into, or takes it out of.

    `.layers` is an attribute of that name (`self.layers[0] = …`), `layers` a name of the function's
    own, `*` any child of a module. Where there is no source, it is every name that it mentions.
    """
    tree = syntax_of(code)
    if tree is None:
        return frozenset({*code.co_varnames, *(f".{name}" for name in names_in(code))})
    found = set[str]()
    for node in ast.walk(tree) if not is_setup(tree.name) else ():
        if isinstance(node, ast.Attribute):
            changes = node.attr in _CHANGING
        else:
            changes = isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load)
        if changes and isinstance(node, (ast.Attribute, ast.Subscript)):
            found |= _stands_for(tree, node.value)
    return frozenset(found)


@lru_cache(maxsize=8192)
def _handed(code: CodeType) -> tuple[tuple[str, int | str, frozenset[str]], ...]:
    """What a function hands to those that it calls: by their name, as which argument, what."""
    tree = syntax_of(code)
    if tree is None:
        return ()
    found = list[tuple[str, int | str, frozenset[str]]]()
    owner = _arguments_of(code)[:1]
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, (ast.Name, ast.Attribute)):
            continue
        first = [arg.id for arg in call.args[:1] if isinstance(arg, ast.Name)]
        is_bound = isinstance(call.func, ast.Attribute) and first != owner  # `Base.forward(self)`
        callee = call.func.id if isinstance(call.func, ast.Name) else call.func.attr
        given: list[tuple[int | str, ast.expr]] = [
            *enumerate(call.args, int(is_bound)),
            *((keyword.arg or "", keyword.value) for keyword in call.keywords),
        ]
        for place, value in given:
            names = _stands_for(tree, value)
            if not names.isdisjoint(owner):
                names |= _ANY_CHILD
            found.append((callee, place, frozenset(names)))
    return tuple(found)


def _arguments_of(code: CodeType) -> list[str]:
    return list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


def _stands_for(tree: ast.AST, value: ast.expr, seen: frozenset[str] = frozenset()) -> set[str]:
    """The names, as above, of what an expression may be, by itself or by way of local names.

    (What a call gives is another object, but for `getattr(self, "body")` and `self.children()`.)
    """
    found = set[str]()
    waiting: list[ast.AST] = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, ast.Attribute):
            found.add(f".{part.attr}")
        elif isinstance(part, ast.Name):
            found.add(part.id)
            for source in _sources(tree, part.id) if part.id not in seen else ():
                found |= _stands_for(tree, source, seen | {part.id})
        elif not isinstance(part, ast.Call):
            waiting += ast.iter_child_nodes(part)
        elif isinstance(part.func, ast.Name) and part.func.id == "getattr":
            named = [arg.value for arg in part.args[1:2] if isinstance(arg, ast.Constant)]
            found |= {f".{name!s}" for name in named} or _ANY_CHILD
        elif isinstance(part.func, ast.Name) and part.func.id in _PICKING:
            waiting += part.args
        elif isinstance(part.func, ast.Attribute) and part.func.attr in _BELOW:
            found |= _ANY_CHILD
        elif isinstance(part.func, ast.Attribute) and part.func.attr in _CHILDREN:
            waiting.append(part.func.value)
    return found


def _sources(tree: ast.AST, name: str) -> Iterator[ast.expr]:
    """What a local name is set from."""
    for node in ast.walk(tree):
        targets: list[ast.expr | None]
        value: ast.expr | None
        if isinstance(node, ast.Assign):
            targets, value = [*node.targets], node.value
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)):
            targets, value = [node.target], node.value
        elif isinstance(node, (ast.For, ast.comprehension)):
            targets, value = [node.target], node.iter
        elif isinstance(node, ast.withitem):
            targets, value = [node.optional_vars], node.context_expr
        else:
            continue
        set_here = {
            part.id
            for target in targets
            for part in (ast.walk(target) if target is not None else ())
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
        }
        if value is not None and name in set_here:
            yield value


def _is_whole(value: Any, names: Sequence[str]) -> bool:
    """Whether an attribute is an object's own or its class's, and can only change by a write."""
    for name in names:
        found = inspect.getattr_static(value, name, None)
        if isinstance(value, nn.Module):
            found = value._modules.get(name, value._parameters.get(name, found))
        if found is not getattr(value, name, None):  # a property, a method
            return False
        value = found
    return isinstance(value, _WHOLE)


@lru_cache(maxsize=8192)
def _stored(code: CodeType) -> frozenset[str]:
    """The attributes that a function, and those inside it, write."""
    names = {
        str(step.argval)
        for step in dis.get_instructions(code)
        if step.opname in ("STORE_ATTR", "DELETE_ATTR")
    }
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(names).union(*map(_stored, inner))
