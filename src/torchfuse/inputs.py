"""What verbs are given: a model, and example inputs as a list of cases, one per call of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchfuse.errors import InputError

__all__ = ["Case", "cases", "check_model"]


@dataclass(frozen=True, eq=False)
class Case:
    """The arguments of one call, and the method that is called with them."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    method: str = "forward"

    def __str__(self) -> str:
        """The call in words, shapes instead of values: `forward(1×3×8×8, mask=1×8)`."""
        shown = [_described(arg) for arg in self.args]
        shown += [f"{name}={_described(value)}" for name, value in self.kwargs.items()]
        return f"{self.method}({', '.join(shown)})"


def cases(example_inputs: Any, name: str = "example_inputs") -> list[Case]:
    """The cases that `example_inputs` stands for, at least one; errors call it `name`.

    A tensor is the only positional argument, a tuple all positional arguments, a mapping with
    string keys all keyword arguments; a list is several such cases. A `Case` gives both kinds of
    arguments, or names another method than `forward`.
    """
    if isinstance(example_inputs, list):
        if not example_inputs:
            raise InputError(f"{name} is an empty list; give at least one case to run.")
        return [_case(entry, f"{name}[{i}]") for i, entry in enumerate(example_inputs)]
    return [_case(example_inputs, name)]


def check_model(model: Any) -> None:
    """Raises InputError if `model` is nothing that can be edited."""
    if not isinstance(model, nn.Module):
        hint = ""
        if type(model).__name__ == "ExportedProgram":
            hint = " Use torchfuse.fuse_exported for an ExportedProgram."
        raise InputError(f"Expected a torch.nn.Module, got {type(model).__name__}.{hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "A scripted or traced module cannot be edited; fuse the nn.Module it was made from."
        )


def _case(entry: Any, where: str) -> Case:
    if isinstance(entry, Case):
        return entry
    if isinstance(entry, torch.Tensor):
        return Case((entry,))
    if isinstance(entry, tuple):
        return Case(entry)
    if isinstance(entry, Mapping):
        if wrong := [key for key in entry if not isinstance(key, str)]:
            raise InputError(
                f"{where} has the key {wrong[0]!r}; a dict stands for keyword arguments, so its "
                "keys must be strings. Wrap a dict that is one positional argument: `(value,)`."
            )
        return Case((), dict(entry))
    hint = " Turn a list into a tuple." if isinstance(entry, list) else ""
    raise InputError(
        f"{where} must be a tensor, a tuple of arguments, a dict of keyword arguments, or a list "
        f"of such cases; got {type(entry).__name__}.{hint}"
    )


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "×".join(map(str, value.shape)) or "scalar"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_described, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_described(v)}" for key, v in value.items()) + "}"
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else "…"
