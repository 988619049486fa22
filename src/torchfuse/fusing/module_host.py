"""Carries a plan's matches out on a model, and takes them back."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torchfuse.fusing.blocks.replacing import take_block_back
from torchfuse.fusing.module_edits import Fusions, fold_in, folded_while_called, take_back

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from torchfuse.graph import Graph
    from torchfuse.rules import Match, Rule

__all__ = ["apply", "fused_while_called", "undo"]


def apply(
    target: nn.Module,
    graph: Graph,
    matches: Sequence[tuple[Rule, Match]],
    *,
    keep: bool,
    weights: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Fusions:
    """What was done to `target`: all matches; with `keep` it can be undone.

    `weights` are folded weights that are known, by the path of the batch norm.
    """
    done = Fusions()
    for rule, match in matches:
        first, second = _paths(graph, match)
        known = (weights or {}).get(match.second)
        done.folded.append(fold_in(target, rule, first, second, keep=keep, weights=known))
    return done


def undo(target: nn.Module, done: Fusions) -> None:
    """Takes back what was done."""
    for block in reversed(done.blocks):
        take_block_back(target, block)
    for folded in reversed(done.folded):
        take_back(target, folded)


@contextmanager
def fused_while_called(
    target: nn.Module, graph: Graph, matches: Sequence[tuple[Rule, Match]]
) -> Iterator[None]:
    """A context in which `target` is fused, one layer's folded weights in memory at a time."""
    with ExitStack() as stack:
        for rule, match in matches:
            first, second = _paths(graph, match)
            stack.enter_context(folded_while_called(target, rule, first, second))
        yield


def _paths(graph: Graph, match: Match) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All paths of the two modules."""
    first, second = (
        next((names for names in graph.paths.values() if path in names), (path,))
        for path in match.modules
    )
    return first, second
