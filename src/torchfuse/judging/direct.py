"""Whether code calls one module right on the output of another, with no way around it."""

from __future__ import annotations

import ast
from itertools import pairwise
from typing import TYPE_CHECKING

from torchfuse.judging.sources import syntax_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import CodeType

__all__ = ["is_direct", "names_asked_for", "names_one_after_the_other"]


def is_direct(code: CodeType | None, first: str, second: str) -> bool:
    """Whether the code calls `second` on the output of `first` with no way around it.

    `self.second(self.first(x))`, or `y = self.first(x)`, `z = self.second(y)` one after the other
    in one block, where no other statement mentions y before it is assigned again.
    """
    function = None if code is None else syntax_of(code)
    if function is None:
        return False
    outers = [n for n in ast.walk(function) if _calls(n, second)]
    if len(outers) != 1 or sum(_calls(n, first) for n in ast.walk(function)) != 1:
        return False
    (outer,) = outers
    assert isinstance(outer, ast.Call)
    if not outer.args:
        return False
    source = _unmoved(outer.args[0])
    if _calls(source, first):
        return True
    if not isinstance(source, ast.Name):
        return False
    return any(
        _assigns(one, source.id, first) and _uses_only(function, then, outer, source.id)
        for block in _blocks(function)
        for one, then in pairwise(block)
    )


def names_one_after_the_other(code: CodeType, *names: str | None) -> bool:
    """Whether all that the code does with two attributes is to give them to one call, in order.

    `nn.Sequential(self.conv, self.bn)`, or by a list that is made for it:
    `layers = [self.conv, self.bn]`, `layers.extend(…)`, `nn.Sequential(*layers)`.
    """
    function = syntax_of(code)
    if function is None or len(names) != 2:
        return False
    attributes = [n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute)]
    if any(attributes.count(name) != 1 for name in names if name is not None):
        return False
    collected = _collected_for_a_call(function)
    given = [call.args for call in ast.walk(function) if isinstance(call, ast.Call)]
    given += [node.elts for node in ast.walk(function) if id(node) in collected]  # type: ignore[attr-defined]
    return any(
        [getattr(argument, "attr", None) for argument in pair] == list(names)
        for arguments in given
        for pair in pairwise(arguments)
    )


def _collected_for_a_call(function: ast.FunctionDef) -> set[int]:
    """The lists of which nothing is made but the arguments of a call: by their identity."""
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    lists: dict[str, list[ast.AST]] = {}
    used_otherwise: set[str] = set()
    for node in ast.walk(function):
        if not isinstance(node, ast.Name):
            continue
        around = parents[node]
        if isinstance(around, ast.Assign) and isinstance(around.value, ast.List):
            lists.setdefault(node.id, []).append(around.value)
        elif isinstance(around, ast.Attribute) and around.attr in ("append", "extend"):
            call = parents[around]
            if isinstance(call, ast.Call) and isinstance(parents[call], ast.Expr):
                lists.setdefault(node.id, []).extend(call.args)
            else:
                used_otherwise.add(node.id)
        elif not (isinstance(around, ast.Starred) and isinstance(parents[around], ast.Call)):
            used_otherwise.add(node.id)
    return {
        id(entry)
        for name, entries in lists.items()
        if name not in used_otherwise
        for entry in entries
        if isinstance(entry, ast.List)
    }


def names_asked_for(code: CodeType) -> frozenset[str] | None:
    """The names that the code gives to `getattr`; None if they are more than constants of its own.

    `for name in ("layer1", "layer2"): getattr(self, name)`; of `f"layer{i}"` it is `layer*`.
    """
    function = syntax_of(code)
    if function is None:
        return None
    found: set[str] = set()
    waiting = [
        argument
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "getattr"
        for argument in call.args[1:2]
    ]
    followed: set[str] = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, ast.Constant):
            found.add(str(value.value))
        elif isinstance(value, ast.JoinedStr) and isinstance(value.values[0], ast.Constant):
            found.add(f"{value.values[0].value!s}*")
        elif isinstance(value, (ast.Tuple, ast.List)):
            waiting += value.elts
        elif isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Slice):
            waiting.append(value.value)
        elif isinstance(value, ast.Name):
            if value.id not in followed:
                followed.add(value.id)
                sources = _sources(function, value.id)
                if not sources:
                    return None
                waiting += sources
        else:
            return None
    return frozenset(found)


def _sources(function: ast.FunctionDef, name: str) -> list[ast.expr]:
    """What a local name is given, by assignments and loops; empty if by anything else as well."""
    sources = []
    for node in ast.walk(function):
        if isinstance(node, ast.arg) and node.arg == name:
            return []
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            if not isinstance(node, (ast.Assign, ast.For)):
                return []
            sources.append(node.value if isinstance(node, ast.Assign) else node.iter)
    stores = sum(
        isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store)
        for n in ast.walk(function)
    )
    return sources if stores == len(sources) else []


def _unmoved(value: ast.expr) -> ast.expr:
    """`y` of `y.flatten(0, 1)`: what a chain of tensor methods starts from."""
    while (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Attribute)
        and not (isinstance(value.func.value, ast.Name) and value.func.value.id == "self")
        and isinstance(value.func.value, (ast.Call, ast.Name))
        and not _is_torch(value.func.value)
    ):
        value = value.func.value
    return value


def _is_torch(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and value.id in ("torch", "F", "nn")


def _calls(node: ast.AST, attribute: str) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == attribute
    )


def _assigns(statement: ast.stmt, name: str, first: str) -> bool:
    """Whether the statement is `name = self.first(…)`, moved or not."""
    return (
        isinstance(statement, ast.Assign)
        and len(statement.targets) == 1
        and isinstance(statement.targets[0], ast.Name)
        and statement.targets[0].id == name
        and _calls(_unmoved(statement.value), first)
    )


def _uses_only(function: ast.FunctionDef, then: ast.stmt, outer: ast.Call, name: str) -> bool:
    """Whether `then` calls the batch norm on every way, and `name` is not used after it."""
    if not isinstance(then, (ast.Return, ast.Assign)) or then.value is None:
        return False
    if all(node is not outer for node in ast.walk(then.value)):
        return False
    if any(isinstance(n, (ast.IfExp, ast.BoolOp, ast.Lambda)) for n in ast.walk(then.value)):
        return False
    if _loads(then.value, name) != 1:  # `[y, self.bn(y)][…]`
        return False
    again = isinstance(then, ast.Return) or any(
        isinstance(target, ast.Name) and target.id == name for target in then.targets
    )
    return again or _loads(function, name) == _loads(then, name)


def _blocks(function: ast.AST) -> Iterable[list[ast.stmt]]:
    for node in ast.walk(function):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list) and block:
                yield block


def _loads(tree: ast.AST, name: str) -> int:
    return sum(
        isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)
        for node in ast.walk(tree)
    )
