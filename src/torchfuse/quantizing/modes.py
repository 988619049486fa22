"""Which modules compute something else in training mode than in eval mode."""

from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

__all__ = ["has_modes"]


def has_modes(module: nn.Module) -> bool:
    """Return whether what the module computes may depend on its own training flag.

    What its `forward` calls, of its own methods and of its file's functions, is searched for a
    mention of `training`. Hooks and compiled code may look at the flag unseen.
    """
    if module._forward_pre_hooks or module._forward_hooks:
        return True
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if callable(vars(module).get("forward")) and not _functions(vars(module)["forward"]):
        return True
    searched: set[FunctionType] = set()
    waiting = [
        function
        for name in ("__call__", "forward")
        for function in _definitions(module, name, inherited=False)
    ]
    while waiting:
        function = waiting.pop()
        if function in searched:
            continue
        searched.add(function)
        names = set(_names(function.__code__))
        if "training" in names:
            return True
        # `super().forward(x)`, or `Base.forward(self, x)`: what a class overrides counts as well.
        inherited = bool(names & {"super", function.__name__})
        for name in names:
            waiting += _definitions(module, name, inherited=inherited)
            waiting += _functions(function.__globals__.get(name))
    return False


def _definitions(module: nn.Module, name: str, *, inherited: bool) -> list[FunctionType]:
    """Return the functions that `module.name` is, with those that it overrides if `inherited`."""
    owners = [owner for owner in type(module).__mro__ if owner not in (nn.Module, object)]
    found = [vars(owner)[name] for owner in owners if name in vars(owner)]
    if name in vars(module):
        found.insert(0, vars(module)[name])
    return [
        function for value in found[: None if inherited else 1] for function in _functions(value)
    ]


def _functions(value: Any) -> list[FunctionType]:
    """Return the Python functions behind a class's attribute, decorated ones with their wrapper."""
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, staticmethod | classmethod | MethodType):
        value = value.__func__
    if not isinstance(value, FunctionType):
        return []
    inner = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    return [value, *(function for cell in inner for function in _functions(cell))]


def _is_filled(cell: Any) -> bool:
    try:
        return isinstance(cell.cell_contents, FunctionType)
    except ValueError:  # of a function that is still being defined
        return False


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names and the texts in a function, and in the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant  # getattr(self, "training")
        elif isinstance(constant, CodeType):
            yield from _names(constant)
