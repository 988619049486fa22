"""Finds every candidate in a recorded model, and judges it: a match to be fused, or a skip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchfuse.conditions.dataflow import origin, owner_path
from torchfuse.conditions.methods import parts_of_forward, reached_apart
from torchfuse.conditions.other_paths import breaks_on_some_path
from torchfuse.conditions.sources import functions_of, is_setup, names_in
from torchfuse.conditions.straight import where_it_may_turn
from torchfuse.conditions.whole_cost import whole
from torchfuse.fusing.module_edits import is_folded
from torchfuse.graph.recording import Recorder
from torchfuse.planning import Fusion, FusionPlan, Skip
from torchfuse.rules import RULES, Match, Refusal, Rule, Subject

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchfuse.cases import Case
    from torchfuse.fusing.blocks.planned import Block
    from torchfuse.fusing.proving.pairs import PairDifference
    from torchfuse.graph import Call, Graph

# Operators that run functions of the model's own, as graphs.
_HIGHER_ORDER = frozenset({"cond", "while_loop", "scan", "map_impl", "associative_scan"})

__all__ = ["Found", "find", "not_after_a_layer"]


class Found:
    """Matches to be fused, and skips, of one model."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.matches: list[tuple[Rule, Match]] = []
        self.skips: list[Skip] = []
        self.blocks: list[Block] = []  # whose branches are to be merged
        self.max_rel: dict[str, float] = {}

    def skip(self, modules: tuple[str, ...], refusal: Refusal, rule: str | None) -> None:
        """Adds a skip."""
        self.skips.append(Skip(modules, refusal.reason, refusal.hint, rule))

    def reject(self, entry: tuple[Rule, Match], reason: str) -> None:
        """Makes a skip of a match that did not pass its proof."""
        rule, match = entry
        hint = "Please report it: a fold that does not hold is a defect of torchfuse or of torch."
        self.skip(match.modules, Refusal(reason, hint), rule.name)

    def drop_unproved(self, found: Mapping[str, PairDifference]) -> None:
        """Keeps the matches whose pair (by the norm's path) agrees; the rest becomes skips."""
        kept = []
        for rule, match in self.matches:
            pair = found.get(match.second)
            if pair is None or pair.problem is not None:
                why = "it did not run while comparing." if pair is None else pair.problem
                self.reject((rule, match), f"The fold did not pass its proof: {why}")
            else:
                self.max_rel[match.second] = pair.max_rel
                kept.append((rule, match))
        self.matches = kept

    def plan(self) -> FusionPlan:
        """The plan as plain data."""
        return FusionPlan(
            model=self.subject.graph.model,
            scope=(*_scope(self.subject), *_parts(self), *_rewritten(self), *_in_bulk(self)),
            fusions=tuple(
                _fusion(self.subject, rule, match, self.max_rel.get(match.second))
                for rule, match in self.matches
            )
            + tuple(fusion for block in self.blocks for fusion in block.fusions),
            skips=tuple(self.skips),
            whole=whole(
                self.subject.graph,
                {match.second for _, match in self.matches}.union(
                    *(block.absorbed for block in self.blocks)
                ),
            ),
        )


def _scope(subject: Subject) -> tuple[str, ...]:
    graph = subject.graph
    trains = any(module.training for module in subject.modules.values())
    modes = "Every module's training flag" if trains else "Evaluation mode, every module's flag"
    shown = ", ".join(graph.cases[:3]) + (" …" if len(graph.cases) > 3 else "")
    sentences = [
        f"{shown}, and other inputs with the same numbers of dimensions that take the same path "
        "through the code.",
        f"{modes} and attributes as they were here, and the same arguments that are not tensors.",
    ]
    if graph.reads:
        places = list(dict.fromkeys(read.where for read in graph.reads))
        sentences.append(
            "The code looks at values or sizes of tensors "
            f"({', '.join(places[:3])}{' …' if len(places) > 3 else ''}); only what holds on "
            "every side of its branches is fused."
        )
    if "execution_paths" in vars(subject) and (lost := subject.execution_paths.lost) is not None:
        sentences.append(
            f"Not every path through the code could be followed ({lost}); with strict, what that "
            "leaves in doubt is skipped."
        )
    return tuple(sentences)


def _parts(found: Found) -> tuple[str, ...]:
    """The sentence that names methods which are right only as parts of what was recorded."""
    parts = sorted(
        {part for _, match in found.matches for part in parts_of_forward(found.subject, match)}
    )
    if not parts:
        return ()
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return (
        "Inner methods as the model itself calls them; called from outside, "
        f"{', '.join(parts[:3])}{more} would see a folded layer.",
    )


def _rewritten(found: Found) -> tuple[str, ...]:
    """The sentence that names modules whose forward is written anew."""
    if not found.blocks:
        return ()
    paths = [block.path for block in found.blocks]
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return (
        f"Blocks whose forward is written anew ({', '.join(paths[:3])}{more}) as the model itself "
        "calls them, and as their attributes were here; what was inside of them is gone.",
    )


_IN_BULK = frozenset({"parameters", "named_parameters", "buffers", "named_buffers", "state_dict"})


def _in_bulk(found: Found) -> tuple[str, ...]:
    """The sentence that names methods of the model that read all weights at once."""
    class_: Any = type(found.subject.model)  # mypy takes nn.Module's own __hash__ for its class's
    ran = {code for code, _ in found.subject.graph.codes}
    reading = [
        name
        for name, function in functions_of(class_)
        if names_in(function.__code__) & _IN_BULK
        and function.__code__ not in ran
        and not is_setup(name)
    ]
    if not reading or not found.matches:
        return ()
    return (f"What reads all weights at once finds the folded ones: {', '.join(reading[:3])}.",)


def find(
    model: nn.Module, given: Sequence[Case], rules: Sequence[Rule], *, strict: bool = False
) -> Found:
    """Records `model` on the given cases and judges every batch norm.

    With `strict`, what could not be followed on all paths through the code is a skip.
    """
    recorder = Recorder(model)
    graph = _recorded(recorder, given)
    modules = dict(model.named_modules(remove_duplicate=False))
    subject = Subject(recorder, graph, modules, tuple(given), strict)
    found = Found(subject)
    seen: set[str] = set()
    for second, calls in subject.norms.items():
        seen.add(second)
        if rules:
            _judge(found, rules, second, calls)
    for path, module in model.named_modules():
        if rules and isinstance(module, _BatchNorm) and path not in seen and not is_folded(module):
            found.skip(
                (path,),
                Refusal(
                    f"`{path}` did not run on the example inputs{_maybe_a_branch(graph)}.",
                    "Give example inputs that reach it.",
                ),
                None,
            )
    return found


def _recorded(recorder: Recorder, given: Sequence[Case]) -> Graph:
    # A function of its own, so that its time can be told from that of exploring.
    return recorder.record(given)


def _maybe_a_branch(graph: Graph) -> str:
    """Where else it may have run, in brackets; empty if there is no sign of that."""
    higher = [call.target for call in graph.calls if call.target in _HIGHER_ORDER]
    if higher:
        return f" where it can be seen (perhaps inside torch.{higher[0]})"
    data = [read for read in graph.reads if read.kind == "data"]
    return f" (a branch may depend on the values read at {data[0].where})" if data else ""


def _judge(found: Found, rules: Sequence[Rule], second: str, calls: list[Call]) -> None:
    subject, graph = found.subject, found.subject.graph
    traced = [origin(graph, call) for call in calls]
    makers = [maker for maker, _ in traced]
    kinds = {maker.kind if maker else None for maker in makers}
    known = {rule.pattern[0]: rule for rule in rules}
    foldable = [maker for maker in makers if maker is not None and maker.kind in known]
    if not foldable:
        unasked = [rule.name for rule in RULES if rule.pattern[0] in kinds]
        refusal = not_after_a_layer(subject, makers)
        if unasked:
            refusal = Refusal(f"The rule {unasked[0]}, which is about it, was not asked for.")
        found.skip((second,), refusal, None)
        return
    rule = known[foldable[0].kind]
    paths = {owner_path(graph, maker) for maker in foldable}
    first = owner_path(graph, foldable[0])
    # One norm after two layers could be folded into each, but a module has one norm to take out,
    # and both would have to go at once.
    if len(foldable) < len(makers) or len(paths) > 1:
        others = sorted(paths - {first}) or sorted(str(k) for k in kinds - {foldable[0].kind})
        refusal = Refusal(
            f"`{second}` is called more than once, after `{first}` and after "
            f"{'`' + others[0] + '`' if others and paths - {first} else 'something else'}.",
            "Give each use a batch norm of its own.",
        )
        found.skip((first, second), refusal, rule.name)
        return
    match = Match(
        first,
        second,
        tuple(foldable),
        tuple(between for _, between in traced),
        tuple(calls),
    )
    verdict = _judged(subject, rule, match)
    if verdict is None:
        found.matches.append((rule, match))
    else:
        found.skip(match.modules, verdict, rule.name)


def _judged(subject: Subject, rule: Rule, match: Match) -> Refusal | None:
    """What was recorded first, then other methods, then other paths through the code."""
    return (
        rule.check(subject, match) or reached_apart(subject, match) or _another_path(subject, match)
    )


def _another_path(subject: Subject, match: Match) -> Refusal | None:
    """None if the match holds on every path that exploring finds, where code asks for anything."""
    if not subject.graph.may_turn:
        return None
    if (left_at := breaks_on_some_path(subject, match)) is not None:
        where = f"On {left_at}" if "(" in left_at else f"With another answer at {left_at}"
        return Refusal(
            f"{where}, the code takes another path, on which `{match.second}` does not follow "
            f"`{match.first}`, or something else uses what lies between.",
            _HINT,
        )
    lost = subject.execution_paths.lost
    if lost is None:
        return None
    if (turn := where_it_may_turn(subject, match)) is not None:
        return Refusal(
            f"The code between `{match.first}` and `{match.second}` ({turn}) branches, and not "
            f"every path could be followed: {lost}.",
            _HINT,
        )
    if not subject.strict:
        return None
    return Refusal(
        f"Not every path through the code could be followed: {lost}.",
        "Without strict, only what is known against a fold is held against it.",
    )


_HINT = "Call the batch norm directly on the layer's output, or put both in nn.Sequential."


def not_after_a_layer(subject: Subject, makers: Sequence[Call | None]) -> Refusal:
    """Why a batch norm whose input comes from `makers` is no candidate."""
    known = [maker for maker in makers if maker is not None]
    if not known:
        return Refusal(
            "Its input is an input of the model, or was made where the recording cannot see."
        )
    for maker in known:
        path = maker.module_path
        if path in subject.modules and subject.modules[path]._forward_hooks:
            return Refusal(
                f"Its input comes from {maker.target}, in or after a hook of `{path}`.",
                "Remove the hook.",
            )
    shown = ", ".join(sorted({_kind_in_words(maker) for maker in known}))
    return Refusal(
        f"Its input comes from {shown}, not straight from a convolution or linear layer."
    )


def _kind_in_words(maker: Call) -> str:
    return f"outside torch's functions ({maker.target})" if maker.kind == "unseen" else maker.kind


def _fusion(subject: Subject, rule: Rule, match: Match, max_rel: float | None) -> Fusion:
    norm = subject.modules[match.second]
    saved = sum(parameter.numel() for parameter in norm.parameters(recurse=False))
    if "bias" not in match.firsts[0].operands:
        saved -= match.seconds[0].operands["input"].shape[1]
    once = [call.operands["input"] for call in match.seconds if call.case == 0]
    size = getattr(torch, match.seconds[0].operands["input"].dtype).itemsize
    return Fusion(
        rule=rule.name,
        modules=match.modules,
        parameters_saved=saved,
        # The batch norm read and wrote its whole input once.
        traffic_saved_bytes=sum(2 * operand.numel * size for operand in once),
        macs_saved=sum(operand.numel for operand in once),
        max_rel=max_rel,
    )
