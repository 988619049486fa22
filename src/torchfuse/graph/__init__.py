"""The small dataflow graph that rules read: calls, and the memory they read and write.

A *value* is one block of memory, however many tensors view it: a view, an in-place change and the
tensor itself are the same value. That is what makes "nobody else reads it" a safe statement.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import CodeType

__all__ = ["Call", "Frame", "Graph", "ModuleCall", "Operand", "Read", "Value"]


@dataclass(frozen=True)
class Operand:
    """One tensor as a call saw it."""

    value: int  # index into Graph.values
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in elements
    offset: int  # in elements
    dtype: str  # "float32"

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Value:
    """One block of memory."""

    index: int
    origin: str  # "model", "input", "call", or "unknown" (made where the recording cannot see)
    names: tuple[str, ...] = ()  # the parameters and buffers (dotted names) that live in it
    attributes: tuple[str, ...] = ()  # plain attributes (dotted names) that hold it as well


@dataclass(frozen=True)
class Frame:
    """A Python function on the way from a module's call to a torch function."""

    code: CodeType
    line: int
    module: str  # the Python module the function is defined in
    place: int = -1  # of the call, in the function's bytecode


@dataclass(frozen=True, eq=False)
class Call:
    """One torch function call, or something else that read memory (`kind` says what).

    Beside the field's own words (`conv`, `linear`, `batch_norm`, `relu`, `add` …) `kind` is
    `output` (returned by the model), `hook` (seen by a module's hook), `held` (still held after
    the pass) or `unseen` (an ATen operator outside any recorded function: scripted code).
    """

    index: int
    case: int
    kind: str
    target: str  # the function as torch names it
    module_path: str | None  # innermost module of the model it ran in; None outside of all
    operands: dict[str, Operand]  # by role: "input", "weight", …; by position for other kinds
    results: tuple[Operand, ...] = ()
    written: frozenset[int] = frozenset()  # values changed in place
    attributes: dict[str, Any] = field(default_factory=dict)  # the arguments that are no tensors
    function: Any = None
    args: tuple[Any, ...] = ()  # as called, tensors replaced by operands
    kwargs: dict[str, Any] = field(default_factory=dict)
    frames: tuple[Frame, ...] = ()  # innermost first, up to the module's call
    within: int | None = None  # the innermost module call it ran in

    @property
    def inputs(self) -> tuple[int, ...]:
        """Values read, each once."""
        return tuple(dict.fromkeys(operand.value for operand in self.operands.values()))

    @property
    def outputs(self) -> tuple[int, ...]:
        """Values returned or written, each once."""
        return tuple(dict.fromkeys([*(r.value for r in self.results), *sorted(self.written)]))


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """One call of a module of the model, and the range of `Graph.calls` made inside it."""

    path: str
    case: int
    parent: int | None  # index into Graph.module_calls
    inputs: tuple[int, ...]  # values
    outputs: tuple[int, ...]
    first: int  # calls[first:last] ran inside
    last: int
    callers: tuple[Frame, ...]  # who called it, up to the module call around it


@dataclass(frozen=True)
class Read:
    """What a branch may depend on; `kind` says what.

    Python looked at a tensor's values ("data": bool, item, …), at facts about it ("shape"), at what
    torch is set to ("mode": whether gradients are computed), or catches an error ("error").
    """

    kind: str
    where: str  # "file.py:12"
    module_path: str | None
    position: int  # this many calls had been made
    code: CodeType | None  # the function that looked; None: scripted code


@dataclass(eq=False)
class Graph:
    """Everything that was recorded, over all cases."""

    model: str
    cases: tuple[str, ...]
    values: list[Value] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    module_calls: list[ModuleCall] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    paths: dict[str, tuple[str, ...]] = field(default_factory=dict)  # first path → all paths
    # Python functions that were seen calling modules, each with the module it ran in
    codes: set[tuple[CodeType, str]] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)  # names of attributes that the pass changed
    # Names of the modules' attributes that code wrote, be it the same value again
    written: set[str] = field(default_factory=set)
    # Cases that handed work to another thread: when so many calls had been made
    handed_over: dict[int, int] = field(default_factory=dict)

    @cached_property
    def functions(self) -> frozenset[CodeType]:
        """The Python functions that were seen calling modules, in whichever module."""
        return frozenset(code for code, _ in self.codes)

    @property
    def may_turn(self) -> bool:
        """Whether code asked for anything that a branch may depend on; else there is one path."""
        return bool(self.reads or self.changed)

    def readers(self, value: int) -> tuple[Call, ...]:
        """The calls that read `value`, through whatever view, in running order."""
        return tuple(self._readers[value])

    def writers(self, value: int) -> tuple[Call, ...]:
        """The calls that returned or changed `value`, in running order."""
        return tuple(self._writers[value])

    def module_calls_of(self, path: str) -> tuple[ModuleCall, ...]:
        """The calls of the module at `path` (the first of its names)."""
        return tuple(self._module_calls[path])

    def value_named(self, name: str) -> Value:
        """The value that the parameter or buffer of this dotted name lives in."""
        return self._named[name]

    def values_of(self, path: str) -> tuple[Value, ...]:
        """The values in which the tensors of the module at `path` live (by any of its names)."""
        return tuple(self._owned[path])

    @cached_property
    def _owned(self) -> dict[str, list[Value]]:
        table: dict[str, list[Value]] = defaultdict(list)
        for value in self.values:
            for path in {name.rpartition(".")[0] for name in value.names}:
                table[path].append(value)
        return table

    @cached_property
    def _named(self) -> dict[str, Value]:
        return {name: value for value in self.values for name in value.names}

    @cached_property
    def _readers(self) -> dict[int, list[Call]]:
        table: dict[int, list[Call]] = defaultdict(list)
        for call in self.calls:
            for value in call.inputs:
                table[value].append(call)
        return table

    @cached_property
    def _writers(self) -> dict[int, list[Call]]:
        table: dict[int, list[Call]] = defaultdict(list)
        for call in self.calls:
            for value in call.outputs:
                table[value].append(call)
        return table

    @cached_property
    def _module_calls(self) -> dict[str, list[ModuleCall]]:
        table: dict[str, list[ModuleCall]] = defaultdict(list)
        for call in self.module_calls:
            table[call.path].append(call)
        return table
