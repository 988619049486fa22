"""What a rule is: a pattern, the conditions under which it is exact, and the algebra."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torchfuse.conditions.attached import Attached, attached, first_paths
from torchfuse.conditions.dataflow import batch_norms
from torchfuse.conditions.sources import edits_modules, functions_of, is_setup, names_in
from torchfuse.conditions.steady import Steady
from torchfuse.graph.exploring import called, explore
from torchfuse.isolation.held_modules import may_hold, modules_in
from torchfuse.planning import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, FunctionType

    from torch import Tensor, nn

    from torchfuse.cases import Case
    from torchfuse.graph import Call, Graph
    from torchfuse.graph.exploring import ExecutionPaths
    from torchfuse.graph.recording import Recorder

__all__ = ["Match", "Refusal", "Rule", "Subject", "same_tensor"]


_TABLES = frozenset({"_modules", "_parameters", "_buffers"})


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and what was recorded of it."""

    recorder: Recorder  # which can record it again
    graph: Graph
    modules: dict[str, nn.Module]  # by every path
    cases: tuple[Case, ...] = ()  # what was recorded; none: it cannot be run
    strict: bool = False  # what could not be followed on all paths is a skip
    # Public methods of the model as entries of their own: what was recorded, None if it cannot be
    entries: dict[str, Subject | None] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.recorder.model

    @cached_property
    def norms(self) -> dict[str, list[Call]]:
        """The batch norm calls of each batch norm."""
        return batch_norms(self.graph)

    @cached_property
    def execution_paths(self) -> ExecutionPaths:
        """The other paths through the code."""
        return explore(self.recorder, self.cases, self.graph)

    @cached_property
    def steady(self) -> Steady:
        """The attributes that no call changes."""
        graphs = (self.graph, *(path.graph for path in self.execution_paths.paths))
        return Steady(self.modules, graphs, [entry.function for entry in self.attached])

    @cached_property
    def called(self) -> tuple[tuple[int, CodeType], ...] | None:
        """The user's functions that are called, each with how many calls were recorded before."""
        return called(self.recorder, self.cases, self.graph)

    @cached_property
    def others(self) -> tuple[Subject, ...]:
        """The model as it was recorded on each of the other paths, if there may be any."""
        if not self.graph.may_turn:  # and need not be explored
            return ()
        return tuple(self.recorded_as(path.graph) for path in self.execution_paths.paths)

    def recorded_as(self, graph: Graph, cases: tuple[Case, ...] = ()) -> Subject:
        """The same model, as another recording shows it."""
        other = replace(self, graph=graph, cases=cases)
        for name in ("attached", "held", "holders", "mentions"):  # asked of the model
            if name in vars(self):
                vars(other)[name] = vars(self)[name]
        return other

    @cached_property
    def attached(self) -> tuple[Attached, ...]:
        """Hooks, and functions in plain attributes that know a module of the model."""
        return attached(self.modules)

    @cached_property
    def held(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """The paths of the modules that a plain attribute (module's path, name) holds."""
        paths = first_paths(self.modules)
        found: dict[tuple[str, str], tuple[str, ...]] = {}
        for path, module in self.modules.items():
            if type(module).__module__.startswith("torch._dynamo."):
                continue  # a compiled module holds the one that it was made from
            for name, value in vars(module).items():
                if name not in _TABLES and may_hold(value):
                    inner = [paths[id(m)] for m in modules_in(value) if id(m) in paths]
                    if inner:
                        found[path, name] = tuple(dict.fromkeys(inner))
        return found

    @cached_property
    def holders(self) -> dict[str, str]:
        """The name of a plain attribute that holds the module of this path, for those held so."""
        return {
            inner: f"{path}.{name}" if path else name
            for (path, name), held in self.held.items()
            for inner in held
        }

    @cached_property
    def mentions(self) -> dict[str, list[tuple[str, FunctionType]]]:
        """The methods, each with its module's path, whose code mentions a name: by that name."""
        found: dict[str, list[tuple[str, FunctionType]]] = defaultdict(list)
        for path, module in self.modules.items():
            class_: Any = type(module)  # mypy takes nn.Module's own __hash__ for its class's
            for name, function in functions_of(class_):
                if not is_setup(name) and not edits_modules(function.__code__):
                    for mentioned in names_in(function.__code__):
                        found[mentioned].append((path, function))
        return found


def same_tensor(subject: Subject, name: str, layer: nn.Module, attribute: str) -> bool:
    """Whether the parameter or buffer of this dotted name is `layer`'s own `attribute`."""
    path, _, last = name.rpartition(".")
    return subject.modules[path] is layer and last == attribute


@dataclass(frozen=True, eq=False)
class Match:
    """Calls that follow one another: first of a weighted layer or a norm, then of what it absorbs.

    There is one entry per recorded call of `second`, over all cases: `firsts[i]` made what
    `seconds[i]` reads, moved by `between[i]` (reshapes, inference-mode dropout).
    """

    first: str  # module path
    second: str  # module path
    firsts: tuple[Call, ...]
    between: tuple[tuple[Call, ...], ...]
    seconds: tuple[Call, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths in running order."""
        return (self.first, self.second)

    @property
    def child(self) -> str | None:
        """The norm's name below the layer, where the layer holds it, and calls it itself."""
        below = f"{self.first}."
        if not self.first:
            return self.second or None
        return self.second.removeprefix(below) if self.second.startswith(below) else None


@dataclass(frozen=True)
class Rule:
    """One fusion."""

    name: str
    pattern: tuple[str, str]  # kinds of the first and of the second call
    summary: str  # one line, for the documentation
    # None: fuse. A refusal: why not.
    check: Callable[[Subject, Match], Refusal | None]
    # The first layer's new weight and bias; touches nothing.
    # Takes a layer and a batch norm, or anything that has their tensors and settings.
    rewrite: Callable[[Any, Any], tuple[Tensor, Tensor]]
    # The same question where calls are rewritten and no module is edited; None: not done there.
    check_in_graph: Callable[[Subject, Match], Refusal | None] | None = None
