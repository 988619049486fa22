"""Proves edits of a program's graph: the calls that went are replayed beside those that came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from torchfuse.errors import InputError
from torchfuse.fusing.programs.program_proving import example_arguments
from torchfuse.fusing.programs.rewrites._rewrite import Constant, NewCall
from torchfuse.fusing.proving import decided

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.export import ExportedProgram

__all__ = ["Replay", "named", "replay"]

# What rounding may do to a few layers in a row; beyond it, float64 decides.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}


@dataclass(frozen=True, eq=False)
class Replay:
    """An edit as it was carried out; nodes are kept by name, since graphs change."""

    name: str  # of the value that is compared
    before: tuple[tuple[str, Any, tuple[Any, ...], dict[str, Any]], ...]  # name, target, arguments
    after: NewCall | Node
    made: Mapping[int, str]  # by id of a new call: the name of its node
    constants: Mapping[str, Tensor]  # of what the calls that went read
    inputs: tuple[str, ...]  # what else they read
    like: Tensor  # of the dtype and on the device of the value


def replay(program: ExportedProgram, edits: Sequence[Replay]) -> dict[str, tuple[float, str]]:
    """Return, by the value's name, how far each edit moved it, and what is wrong (or "").

    `program` is the one before the first of the edits, whose example inputs are run.

    Raises:
        InputError: it holds no example inputs.
    """
    if not edits:
        return {}
    if program.example_inputs is None:
        raise InputError(
            "The exported program holds no example inputs to prove the fusions on; export it with "
            "them, or pass verify=False."
        )
    wanted = {name for edit in edits for name in edit.inputs}
    values = _Recorder(program, wanted).values
    later = dict(values)
    found: dict[str, tuple[float, str]] = {}
    for edit in edits:
        difference = _difference(edit, later)
        found[edit.name] = max(found.get(edit.name, (0.0, "")), difference, key=_severity)
    return found


def _severity(found: tuple[float, str]) -> tuple[bool, float]:
    return bool(found[1]), found[0]


def _difference(edit: Replay, values: dict[str, Any]) -> tuple[float, str]:
    given = {name: values[name] for name in edit.inputs}
    expected = _before(edit, given, edit.like.dtype)
    fused = _after(edit, given, edit.like.dtype, values)

    def in_float64() -> tuple[Tensor, Tensor]:
        wide = {name: _to(value, torch.float64) for name, value in given.items()}
        return (
            _before(edit, wide, torch.float64),
            _after(edit, wide, torch.float64, {}),
        )

    difference = decided(expected, fused, _ROUNDING.get(edit.like.dtype, 0.0), in_float64)
    return difference.max_rel, difference.problem or ""


def _before(edit: Replay, given: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    made: dict[str, Any] = {name: _copied(value) for name, value in given.items()}
    made |= {name: _to(value, dtype) for name, value in edit.constants.items()}

    def filled(value: Any) -> Any:
        if isinstance(value, _Name):
            return made[value.name]
        if isinstance(value, (list, tuple)):
            return [filled(entry) for entry in value]
        if isinstance(value, torch.dtype):
            return dtype if value.is_floating_point else value
        return value

    with torch.no_grad():
        for name, target, args, kwargs in edit.before:
            result = target(*filled(args), **{key: filled(value) for key, value in kwargs.items()})
            made[name] = result
    last = made[edit.before[-1][0]]
    assert isinstance(last, Tensor)
    return last


def _after(
    edit: Replay, given: Mapping[str, Any], dtype: torch.dtype, values: dict[str, Any]
) -> Tensor:
    def filled(value: Any) -> Any:
        if isinstance(value, Node):
            constant = edit.constants.get(value.name)
            return _copied(given[value.name]) if constant is None else _to(constant, dtype)
        if isinstance(value, Constant):
            return value.value.to(dtype).to(edit.like.device)
        if isinstance(value, NewCall):
            return called(value)
        if isinstance(value, (list, tuple)):
            return [filled(entry) for entry in value]
        return value

    def called(call: NewCall) -> Any:
        result = call.target(*filled(call.args), **call.kwargs)
        if id(call) in edit.made:
            values.setdefault(edit.made[id(call)], result)  # a later edit may read it
        return result

    with torch.no_grad():
        last = filled(edit.after)
    assert isinstance(last, Tensor)
    return last


@dataclass(frozen=True)
class _Name:
    name: str


def named(value: Any) -> Any:
    """Return arguments whose nodes are kept by name."""
    if isinstance(value, Node):
        return _Name(value.name)
    if isinstance(value, (list, tuple)):
        return tuple(named(entry) for entry in value)
    return value


class _Recorder(Interpreter):
    """One pass over a program's example inputs, and what some of its nodes gave."""

    def __init__(self, program: ExportedProgram, wanted: set[str]) -> None:
        super().__init__(program.graph_module)
        self._wanted = wanted
        self.values: dict[str, Any] = {}
        with torch.no_grad():
            self.run(*example_arguments(program), enable_io_processing=False)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self._wanted:
            self.values[n.name] = _copied(value)  # it may be changed in place later
        return value


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _to(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value
