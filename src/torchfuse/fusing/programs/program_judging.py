"""Which batch norms of an exported program can be folded, judged by the same rules as a module's.

Each call there can be given weights of its own, so a rule is asked only whether the fold is exact
in the graph, not whether modules could be edited.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from torchfuse.conditions.dataflow import origin
from torchfuse.fusing.finding import not_after_a_layer
from torchfuse.graph.exported_program import module_path, read
from torchfuse.graph.recording import Recorder
from torchfuse.planning import Skip
from torchfuse.rules import RULES, Match, Refusal, Rule, Subject

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch.export import ExportedProgram
    from torch.fx import Graph, Node

    from torchfuse.graph import Call

__all__ = ["FoldInProgram", "FoundInProgram", "judge"]


@dataclass(frozen=True)
class FoldInProgram:
    """A batch norm, and the call that can take it in."""

    rule: Rule
    layer: Node
    norm: Node

    @property
    def modules(self) -> tuple[str, str]:
        """The modules that the two ran in; the node's own name outside of all modules."""
        return (_path(self.layer), _path(self.norm))


@dataclass(frozen=True)
class FoundInProgram:
    """What can be folded, and what cannot."""

    folds: list[FoldInProgram]
    skips: list[Skip]


def judge(
    program: ExportedProgram,
    fx_graph: Graph,
    targets: Mapping[str, str],
    rules: Collection[str] | None,
    refuted: Mapping[str, str],
) -> FoundInProgram:
    """Return what `rules` (None: all) can fold in `fx_graph`, a later state of `program`'s graph.

    `targets` names the stored tensors of its placeholders; `refuted` are the batch norms that did
    not pass their proof, each with the reason.
    """
    reading = read(program, fx_graph, targets)
    subject = Subject(Recorder(program.graph_module), reading.graph, {})
    calls: dict[Node, list[Call]] = {}
    for call in reading.graph.calls:
        if call.kind == "batch_norm":
            calls.setdefault(reading.nodes[call.index], []).append(call)
    known = {rule.pattern[0]: rule for rule in RULES if rule.check_in_graph is not None}
    found = FoundInProgram([], [])
    for norm, seconds in calls.items():
        traced = [origin(reading.graph, call) for call in seconds]
        firsts = [maker for maker, _ in traced if maker is not None and maker.kind in known]
        if len(firsts) < len(seconds):
            if rules is None:
                refusal = not_after_a_layer(subject, [maker for maker, _ in traced])
                found.skips.append(Skip((_path(norm),), refusal.reason, refusal.hint, None))
            continue
        rule, layer = known[firsts[0].kind], reading.nodes[firsts[0].index]
        if rules is not None and rule.name not in rules:
            continue
        fold = FoldInProgram(rule, layer, norm)
        between = tuple(moved for _, moved in traced)
        match = Match(*fold.modules, tuple(firsts), between, tuple(seconds))
        assert rule.check_in_graph is not None
        refusal_or_none = (
            _refuted(norm, refuted)
            or rule.check_in_graph(subject, match)
            or _stored_whole(fold, targets)
        )
        if refusal_or_none is None:
            found.folds.append(fold)
        else:
            found.skips.append(
                Skip(fold.modules, refusal_or_none.reason, refusal_or_none.hint, rule.name)
            )
    return found


def _refuted(norm: Node, refuted: Mapping[str, str]) -> Refusal | None:
    if norm.name not in refuted:
        return None
    return Refusal(f"The fold did not pass its proof: {refuted[norm.name]}")


def _stored_whole(fold: FoldInProgram, targets: Mapping[str, str]) -> Refusal | None:
    """None if both calls read their weights and statistics as stored; a view of one is a node."""
    layer, norm = fold.modules
    for path, node, roles in (
        (layer, fold.layer, ("weight", "bias")),
        (norm, fold.norm, ("weight", "bias", "running_mean", "running_var")),
    ):
        for role, given in zip(roles, node.args[1:], strict=False):
            if isinstance(given, fx.Node) and given.name not in targets:
                return Refusal(
                    f"The {role} of `{path}` is a part or a view of a stored tensor.",
                    "Store what the call reads as a tensor of its own.",
                )
    return None


def _path(node: Node) -> str:
    return module_path(node) or node.name
