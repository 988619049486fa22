"""What a rule is: a pattern, the conditions under which it is exact, and the algebra."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from torchfuse.graph import Call, Graph

__all__ = ["Match", "Refusal", "Rule", "Subject"]


@dataclass(frozen=True)
class Refusal:
    """Why a match is left alone, and what the user could change (empty if nothing)."""

    reason: str
    hint: str = ""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and what was recorded of it."""

    model: nn.Module
    graph: Graph
    modules: dict[str, nn.Module]  # by every path

    @cached_property
    def classes(self) -> frozenset[type]:
        """The classes of the model and of all modules in it."""
        return frozenset(type(module) for module in self.modules.values())


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


@dataclass(frozen=True)
class Rule:
    """One fusion."""

    name: str
    pattern: tuple[str, str]  # kinds of the first and of the second call
    summary: str  # one line, for the documentation
    # None: fuse. A refusal: why not.
    check: Callable[[Subject, Match], Refusal | None]
    # The first layer's new weight and bias; touches nothing. None: the modules are merged instead.
    rewrite: Callable[[nn.Module, nn.Module], tuple[Tensor, Tensor]] | None
    # Merges two modules into one of a fused class; changes state_dict keys, so only on request.
    merge: Callable[[nn.Module, nn.Module], nn.Module] | None = None

    @property
    def on_request(self) -> bool:
        """Whether the rule runs only when it is asked for by name."""
        return self.merge is not None
