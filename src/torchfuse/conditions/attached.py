"""Functions that hang on modules beside their classes' methods: hooks, lambdas, bound methods."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from torchfuse.isolation.snapshot import MODULE_TABLES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

__all__ = ["Attached", "attached", "first_paths", "functions_in"]

# How deep containers, closures and plain objects are entered.
_DEPTH = 3
_HOOKS = frozenset(
    {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}
)


@dataclass(frozen=True)
class Attached:
    """One function in an attribute, and a module of the model that it knows."""

    where: str  # the attribute: "block.stem"
    function: FunctionType
    path: str  # of the module that it knows
    owner: str | None  # by which name; None: as its first argument
    is_hook: bool


def attached(modules: Mapping[str, nn.Module]) -> tuple[Attached, ...]:
    """Every hook, and every function in a plain attribute that knows a module of the model."""
    paths = first_paths(modules)
    return tuple(
        entry
        for path, module in modules.items()
        if paths[id(module)] == path
        for entry in _attached_to(path, module, paths)
    )


def first_paths(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """The first path of each module, by its identity."""
    paths: dict[int, str] = {}
    for path, module in modules.items():
        paths.setdefault(id(module), path)
    return paths


def _attached_to(path: str, module: nn.Module, paths: dict[int, str]) -> Iterator[Attached]:
    for name, value in vars(module).items():
        is_hook = name in _HOOKS
        if not is_hook and (name in MODULE_TABLES or name == "forward"):
            continue  # (a forward of its own is what runs; that was recorded)
        where = f"{path}.{name}" if path else name
        for function, bound_to in functions_in(value):
            if function.__module__.startswith("torch."):
                continue
            if id(bound_to) in paths:
                if not hasattr(type(bound_to), function.__name__):  # else it is one of its methods
                    yield Attached(where, function, paths[id(bound_to)], None, is_hook)
            elif is_hook and bound_to is None:
                yield Attached(where, function, path, None, is_hook)
            for owner, known in _closure(function):
                if id(known) in paths:
                    yield Attached(where, function, paths[id(known)], owner, is_hook)


def functions_in(value: Any, depth: int = _DEPTH) -> Iterator[tuple[FunctionType, Any]]:
    """Functions in a value, each with what it is bound to."""
    if isinstance(value, FunctionType):
        yield value, None
    elif isinstance(value, MethodType) and isinstance(value.__func__, FunctionType):
        yield value.__func__, value.__self__
    elif isinstance(value, partial) and depth:
        yield from functions_in(value.func, depth - 1)
    elif isinstance(value, (list, tuple, set, dict)) and depth:
        for entry in value.values() if isinstance(value, dict) else value:
            yield from functions_in(entry, depth - 1)


def _closure(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if cell != CellType():  # an empty cell has no contents
            yield name, cell.cell_contents
