"""What a function's source reaches below a module: `self.layers[0].conv(x)` as a chain of names."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from torchfuse.conditions.sources import syntax_of

if TYPE_CHECKING:
    from types import FunctionType

__all__ = ["BELOW", "FACTS", "TENSORS", "Mention", "mentions_of", "only_hands_itself_on"]


BELOW = "**"  # in a chain: anything below, however deep


@dataclass(frozen=True)
class Mention:
    """One way in which a method reaches what is below `self`: `self.layers[0].conv(x)`."""

    chain: tuple[str | None, ...]  # ("layers", "0", "conv"); None: any child; BELOW: any module
    usage: str  # "called", "compared", "read"


@lru_cache(maxsize=4096)
def only_hands_itself_on(function: FunctionType) -> bool:
    """Whether all that a method does with its module is to hand it to functions, for no result."""
    tree = syntax_of(function.__code__)
    if tree is None or not tree.args.args:
        return False
    parents = _parents(tree)
    owner = tree.args.args[0].arg
    calls = [parents[n] for n in parents if isinstance(n, ast.Name) and n.id == owner]
    return all(isinstance(c, ast.Call) and isinstance(parents[c], ast.Expr) for c in calls)


@lru_cache(maxsize=4096)
def mentions_of(function: FunctionType, owner: str | None = None) -> tuple[Mention, ...] | None:
    """What the function reaches below the module that it calls `owner` (None: its first argument).

    None if its source cannot be read: a lambda, code that was made from text.
    """
    tree = syntax_of(function.__code__)
    if tree is None:
        return None
    if owner is None:
        if not tree.args.args:
            return ()
        owner = tree.args.args[0].arg
    owners = _names_of(owner, tree)
    parents = _parents(tree)
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


def _parents(tree: ast.AST) -> dict[ast.AST, ast.AST]:
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def _names_of(owner: str, tree: ast.FunctionDef) -> frozenset[str]:
    """`self`, and the names that it is given: `model = self`, `model = self if … else other`."""
    names = {owner}
    while True:
        known = len(names)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Assign, ast.NamedExpr)) and _may_be(node.value, names):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
        if len(names) == known:
            return frozenset(names)


def _may_be(value: ast.expr, names: set[str]) -> bool:
    if isinstance(value, ast.IfExp):
        return _may_be(value.body, names) or _may_be(value.orelse, names)
    if isinstance(value, ast.BoolOp):
        return any(_may_be(entry, names) for entry in value.values)
    return isinstance(value, ast.Name) and value.id in names


def _mention(
    node: ast.AST, parents: dict[ast.AST, ast.AST], called_names: set[str]
) -> Mention | None:
    chain: list[str | None] = []
    while True:
        parent = parents[node]
        if isinstance(parent, ast.Attribute):
            if isinstance(parent.ctx, ast.Store):
                return None
            if parent.attr in ("children", "named_children", "_modules", "__dict__"):
                return _dynamic(parent, parents, (*chain, None), called_names)
            if parent.attr in ("modules", "named_modules", "get_submodule"):
                return _dynamic(parent, parents, (*chain, BELOW), called_names)
            if parent.attr == "get_parameter":
                return Mention((*chain, None), "called")
            chain.append(parent.attr)
        elif isinstance(parent, ast.Subscript) and parent.value is node:
            index = parent.slice
            if isinstance(index, ast.Slice):
                loop = parents[parent]
                if isinstance(loop, (ast.For, ast.comprehension)) and loop.iter is parent:
                    return Mention((*chain, None, *_done_with_each(loop, parents)), "called")
            chain.append(str(index.value) if isinstance(index, ast.Constant) else None)
            if chain[-1] is None and isinstance(parents[parent], ast.Call):
                return Mention(tuple(chain), "called")
        else:
            break
        node = parent
    if not chain and (isinstance(parent, _HOLDING) or _is_unpacked(node, parent)):
        return Mention((None,), "called")  # so is it by whoever takes it out again
    if isinstance(parent, ast.keyword):
        parent = parents[parent]
    if isinstance(parent, ast.Call):
        if parent.func is node:
            return Mention(tuple(chain), "called")
        name = ast.unparse(parent.func)
        if not chain and name not in _HARMLESS and "init" not in name:
            return Mention((None,), "called")  # whoever is given the module may reach any child
        if name == "getattr" and parent.args[0] is node and len(parent.args) > 1:
            named = parent.args[1]
            if isinstance(named, ast.Constant) and isinstance(named.value, str):
                return Mention((*chain, named.value), "called")
            return _dynamic(parent, parents, (*chain, None), called_names)
        if name in ("isinstance", "hasattr", "len", "type", "id", "super") or "init" in name:
            return None
        if name in ("enumerate", "zip", "iter", "reversed", "list", "tuple", "next"):
            return Mention((*chain, None), "called") if called_names else None
    if isinstance(parent, ast.Compare):
        return Mention(tuple(chain), "compared")
    if isinstance(parent, ast.Delete):
        return None
    if isinstance(parent, (ast.For, ast.comprehension)) and parent.iter is node:
        return Mention((*chain, None), "called") if called_names else None
    return Mention(tuple(chain), "read")


def _done_with_each(
    loop: ast.For | ast.comprehension, parents: dict[ast.AST, ast.AST]
) -> tuple[str | None, ...]:
    """What a loop reaches of each item: nothing of it where it calls the items themselves.

    Else the one method that it calls of them, or anything.
    """
    item = loop.target
    if not isinstance(item, ast.Name):
        return (None,)
    found: set[tuple[str | None, ...]] = set()
    for node, parent in parents.items():
        if isinstance(node, ast.Name) and node.id == item.id and node is not item:
            method = parent if isinstance(parent, ast.Attribute) else None
            used = method or node
            call = parents[used]
            if not (isinstance(call, ast.Call) and call.func is used):
                return (None,)
            found.add((method.attr,) if method else ())
    return found.pop() if len(found) == 1 else (None,)


def _is_unpacked(node: ast.AST, parent: ast.AST) -> bool:
    """`first, second = self`, `match self: …`."""
    if isinstance(parent, ast.Assign):
        return not all(isinstance(target, (ast.Name, ast.Attribute)) for target in parent.targets)
    return isinstance(parent, ast.Match) and parent.subject is node


def _dynamic(
    node: ast.AST,
    parents: dict[ast.AST, ast.AST],
    chain: tuple[str | None, ...],
    called_names: set[str],
) -> Mention | None:
    """Any child may be reached: it counts if what is reached is called, or its weights used."""
    while node in parents:
        parent = parents[node]
        if (
            isinstance(parent, ast.Call)
            and parent.func is node
            and not isinstance(node, ast.Attribute)
        ):
            return Mention(chain, "called")
        if isinstance(parent, (ast.For, ast.comprehension)):
            targets = {n.id for n in ast.walk(parent.target) if isinstance(n, ast.Name)}
            used = targets & called_names or _weights_used(targets, parents)
            return Mention(chain, "called") if used else None
        if isinstance(parent, ast.Assign):
            targets = {n.id for t in parent.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            return Mention(chain, "called") if targets & called_names else None
        node = parent
    return None


def _weights_used(names: set[str], parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether `m.weight` (of `for m in self.modules()`) is computed with."""
    for node in parents:
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
            continue
        if node.value.id not in names or node.attr not in TENSORS:
            continue
        parent = parents[node]
        if isinstance(parent, ast.Attribute):
            if parent.attr not in FACTS | {"data", "requires_grad_"}:
                return True
        elif isinstance(parent, ast.BinOp) or (
            isinstance(parent, ast.Call) and "init" not in ast.unparse(parent.func)
        ):
            return True
    return False


# Attributes of a layer or a batch norm that hold values; and what may be asked of those values
# without getting to know them.
TENSORS = frozenset(
    {
        *("weight", "bias", "running_mean", "running_var", "parametrizations"),
        *("weight_g", "weight_v", "weight_u", "weight_orig"),
    }
)
FACTS = frozenset({"dtype", "device", "shape", "size", "dim", "numel", "ndim", "requires_grad"})
_HOLDING = (ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Starred, ast.arguments)
_HARMLESS = frozenset(
    {
        *("isinstance", "hasattr", "len", "type", "id", "super", "getattr", "setattr", "print"),
        *("str", "repr", "callable", "enumerate", "zip", "iter", "reversed", "list", "tuple"),
        *("next", "ValueError", "TypeError", "RuntimeError"),
    }
)
