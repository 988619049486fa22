"""The source of Python functions, as syntax trees."""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import textwrap
from functools import lru_cache
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "assigned_attributes",
    "descriptors_of",
    "edits_modules",
    "functions_of",
    "is_setup",
    "names_in",
    "syntax_of",
]


@lru_cache(maxsize=4096)
def syntax_of(code: CodeType) -> ast.FunctionDef | None:
    """The function's syntax tree; None if there is no source, or it is no plain function.

    A file that was edited since it was imported holds the source of other functions by now.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None
    function = next((node for node in tree.body[:1] if isinstance(node, ast.FunctionDef)), None)
    return function if function is not None and _is_source_of(function, code) else None


def _is_source_of(function: ast.FunctionDef, code: CodeType) -> bool:
    """Whether the function has this name, these arguments, and names all that its code does."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    count = code.co_argcount + code.co_kwonlyargcount
    if (function.name, tuple(a.arg for a in named)) != (code.co_name, code.co_varnames[:count]):
        return False
    if not all(name.replace(".", "").isidentifier() for name in code.co_names):
        return True  # a tool rewrote it as it was imported, as pytest does with each assert
    known: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            known.add(node.id)
        elif isinstance(node, ast.Attribute):
            known.add(node.attr)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            known |= {alias.name for alias in node.names}
            known |= {part for alias in node.names for part in alias.name.split(".")}
            known.add(getattr(node, "module", None) or "")
    return all(name in known for name in code.co_names if "__" not in name)


def _members(class_: type) -> Iterator[tuple[str, Any]]:
    """What a class and its bases (torch's own apart) define, the class's own first."""
    for base in class_.__mro__:
        if base is not object and not base.__module__.startswith("torch."):
            yield from vars(base).items()


@lru_cache(maxsize=4096)
def functions_of(class_: type) -> tuple[tuple[str, FunctionType], ...]:
    """The functions that a class and its bases (torch's own apart) define, decorators taken off.

    A function that a subclass overrides is left out, unless the override goes on to `super()`.
    """
    hidden: set[str] = set()
    found: list[tuple[str, FunctionType]] = []
    for name, member in _members(class_):
        function = _function(member)
        if function is None or name in hidden:
            continue
        if "super" not in names_in(function.__code__):
            hidden.add(name)
        found.append((name, function))
    return tuple(found)


@lru_cache(maxsize=4096)
def descriptors_of(class_: type) -> tuple[tuple[str, FunctionType], ...]:
    """What runs for objects in a class that are no functions, but have `__get__` or `__call__`."""
    found: list[tuple[str, FunctionType]] = []
    for name, member in _members(class_):
        kind = type(member)
        if isinstance(member, type) or _function(member) is not None:
            continue
        if kind.__module__.partition(".")[0] in ("torch", "builtins", "functools"):
            continue
        for special in ("__get__", "__call__"):
            function = getattr(kind, special, None)
            if isinstance(function, FunctionType):
                found.append((name, function))
    return tuple(found)


def _function(member: Any) -> FunctionType | None:
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    elif isinstance(member, functools.cached_property):
        member = member.func
    try:
        member = inspect.unwrap(member)
    except (ValueError, AttributeError):
        return None
    return member if isinstance(member, FunctionType) else None


@lru_cache(maxsize=8192)
def names_in(code: CodeType) -> frozenset[str]:
    """The names and strings that a function and the functions inside it mention."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= names_in(constant)
        elif isinstance(constant, str):
            names.add(constant)
    return frozenset(names)


@lru_cache(maxsize=8192)
def assigned_attributes(code: CodeType) -> frozenset[str]:
    """The attributes that a function assigns, or whose value it changes: `self.seen.append(x)`.

    So are global names, and those of a function around it.
    """
    assigned = {
        str(step.argval)
        for step in dis.get_instructions(code)
        if step.opname in ("STORE_ATTR", "STORE_GLOBAL")
        or (step.opname == "STORE_DEREF" and step.argval in code.co_freevars)
    }
    outside = {*code.co_names, *code.co_freevars} - {*code.co_varnames, *code.co_cellvars}
    tree = syntax_of(code)
    for node in [] if tree is None else ast.walk(tree):
        match _changed(node):
            case ast.Attribute(attr=name):
                assigned.add(name)
            case ast.Name(id=name) if name in outside:
                assigned.add(name)
        assigned.update(_set_by_name(node))
    return frozenset(assigned)


def _changed(node: ast.AST) -> ast.AST | None:
    """What a container's own method, an assigned item, or `next` changes."""
    match node:
        case ast.Call(func=ast.Attribute(value=container, attr=method)) if method in _CHANGING:
            return container
        case ast.Call(func=ast.Name(id="next"), args=[iterator, *_]):
            return iterator
        case ast.Subscript(value=container, ctx=ast.Store() | ast.Del()):
            return container
    return None


ANY_NAME = "*"


def _set_by_name(node: ast.AST) -> Iterator[str]:
    """`setattr(self, "large", …)`, `self.__dict__["large"] = …`, `vars(self).update(large=…)`."""
    match node:
        case ast.Call(func=ast.Name(id="setattr"), args=[_, name, _]):
            yield _text(name)
        case ast.Subscript(value=table, slice=name, ctx=ast.Store()) if _is_table(table):
            yield _text(name)
        case ast.Call(func=ast.Attribute(value=table, attr="update")) if _is_table(table):
            yield from (keyword.arg or ANY_NAME for keyword in node.keywords)
            if node.args:
                yield ANY_NAME


@lru_cache(maxsize=8192)
def edits_modules(code: CodeType) -> bool:
    """Whether a function takes attributes away or replaces a forward, as a model's own `fuse` does.

    Such a method changes the model, and computes no outputs.
    """
    steps = list(dis.get_instructions(code))
    return bool({"delattr", "__delattr__"} & {*code.co_names}) or any(
        step.opname == "DELETE_ATTR" or (step.opname == "STORE_ATTR" and step.argval == "forward")
        for step in steps
    )


def _text(name: ast.expr) -> str:
    return str(name.value) if isinstance(name, ast.Constant) else ANY_NAME


def _is_table(value: ast.expr) -> bool:
    """Whether it is the dictionary of an object's attributes."""
    return ast.unparse(value).endswith(".__dict__") or ast.unparse(value).startswith("vars(")


_CHANGING = frozenset(
    {
        *("append", "appendleft", "extend", "insert", "pop", "popleft", "remove", "clear", "sort"),
        *("reverse", "discard", "update", "setdefault", "popitem", "rotate"),
    }
)


_SETUP = ("init", "initialize", "initialise", "initialized", "reset", "tie")
_SETUP_NAMES = frozenset(
    {
        *("extra_repr", "__repr__", "__init__", "__setstate__", "__getstate__"),
        *("state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict"),
    }
)


def is_setup(name: str) -> bool:
    """Whether a method of this name sets a model up or prints it, and computes no outputs."""
    return name in _SETUP_NAMES or any(word in _SETUP for word in name.split("_"))


# What a branch may ask for that changes between calls although no input does. (`requires_grad` is
# not among it: asking an input for that is recorded, and behind a flag that is off, nobody asks.)
RESTLESS = frozenset(
    {
        *("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled"),
        *("grad_fn", "random", "randint", "rand", "time"),
    }
)
