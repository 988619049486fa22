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
    "descriptors_of",
    "edits_modules",
    "functions_of",
    "is_setup",
    "names_asked_for",
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


_SETUP = ("init", "initialize", "initialise", "initialized", "reset", "tie")
_SETUP_NAMES = frozenset(
    {
        *("extra_repr", "__repr__", "__init__", "__setstate__", "__getstate__"),
        *("state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict"),
    }
)


@lru_cache(maxsize=4096)
def is_setup(name: str) -> bool:
    """Whether a method of this name sets a model up or prints it, and computes no outputs."""
    return name in _SETUP_NAMES or any(word in _SETUP for word in name.split("_"))
