"""When is it exact to fold a batch norm into the layer before it? Every condition, in order.

Conditions are about what was recorded, and about the modules as they are. What the code could do
on other paths through it is the question of `other_paths.py` and `methods.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torchfuse.conditions.dataflow import keeps_channels
from torchfuse.conditions.editable import layer_is_a_module, no_hook_renames_keys, norm_is_a_module
from torchfuse.conditions.subject import Match, Refusal
from torchfuse.conditions.unshared import (
    always_together,
    nobody_else_reads,
    nobody_else_reads_the_weight,
    statistics_are_its_own,
    weight_is_its_own,
)

if TYPE_CHECKING:
    from torchfuse.conditions.subject import Subject

__all__ = ["exact_in_graph", "exact_on_path", "foldable"]


def foldable(subject: Subject, match: Match) -> Refusal | None:
    """None if the match can be folded exactly within what was recorded; otherwise why not."""
    for condition in (
        # The first that refuses is the reason that is printed: what a user can change at once comes
        # before what was followed through the graph.
        _no_threads,
        _norm_uses_statistics,
        norm_is_a_module,
        layer_is_a_module,
        no_hook_renames_keys,
        always_together,
        nobody_else_reads,
        weight_is_its_own,
        statistics_are_its_own,
        _channels_agree,
        _dtypes_agree,
    ):
        if (refusal := condition(subject, match)) is not None:
            return _with_another_path(subject, match, refusal, condition in _ABOUT_MODULES)
    return None


def exact_on_path(subject: Subject, match: Match) -> Refusal | None:
    """None if the match, which is foldable as recorded, is exact on another path too.

    What does not depend on the way (the modules, and what holds them) is not asked for again.
    """
    for condition in (
        _no_threads,
        _norm_uses_statistics,
        norm_is_a_module,
        layer_is_a_module,
        always_together,
        nobody_else_reads,
        nobody_else_reads_the_weight,
        statistics_are_its_own,
        _channels_agree,
        _dtypes_agree,
    ):
        if (refusal := condition(subject, match)) is not None:
            return refusal
    return None


# What stands in the way of editing modules, and not of rewriting calls.
_ABOUT_MODULES = (
    norm_is_a_module,
    layer_is_a_module,
    no_hook_renames_keys,
    always_together,
    weight_is_its_own,
    statistics_are_its_own,
)


def _with_another_path(
    subject: Subject, match: Match, refusal: Refusal, about_modules: bool
) -> Refusal:
    """The refusal, whose hint ends with `fuse_exported` where that can do it."""
    if (
        not about_modules
        or "fuse_exported" in refusal.hint
        or exact_in_graph(subject, match) is not None
    ):
        return refusal
    return replace(refusal, hint=f"{refusal.hint} torchfuse.fuse_exported can fold it.".lstrip())


def exact_in_graph(subject: Subject, match: Match) -> Refusal | None:
    """None if the match is exact where each call can be given weights of its own, as in a graph.

    What only matters where modules are edited (who else calls them, hooks, subclasses) is not
    asked for: `subject` may be without modules.
    """
    for condition in (
        _norm_uses_statistics,
        _parameters_are_stored,
        nobody_else_reads,
        _channels_agree,
        _dtypes_agree,
    ):
        if (refusal := condition(subject, match)) is not None:
            return refusal
    return None


def _parameters_are_stored(subject: Subject, match: Match) -> Refusal | None:
    """Every weight and statistic is a stored tensor that the program does not change."""
    graph = subject.graph
    roles = {"weight", "bias", "running_mean", "running_var"}
    for call in (*match.firsts, *match.seconds):
        path = match.first if call in match.firsts else match.second
        for role in sorted(roles & call.operands.keys()):
            value = graph.values[call.operands[role].value]
            if not value.names:
                return Refusal(f"The {role} of `{path}` is computed, not stored.")
            # The fold reads it once; what is written later would never arrive.
            if any(value.index in writer.written for writer in graph.writers(value.index)):
                return Refusal(f"The {role} of `{path}` changes during the pass.")
    return None


def _no_threads(subject: Subject, match: Match) -> Refusal | None:
    # What was made before the work was handed over, and is held by nothing by then, no thread can
    # read.
    since = subject.graph.handed_over
    if any(c.case in since and c.index >= since[c.case] for c in (*match.firsts, *match.seconds)):
        return Refusal(
            "The model hands work to another thread, where it cannot be seen what is read.",
            "Run everything in one thread while planning.",
        )
    return None


def _norm_uses_statistics(_: Subject, match: Match) -> Refusal | None:
    for call in match.seconds:
        if "running_mean" not in call.operands or "running_var" not in call.operands:
            return Refusal(
                f"`{match.second}` has no running statistics: it normalises by each batch.",
                "Use track_running_stats=True and recompute the statistics from data.",
            )
        if call.attributes.get("training"):
            return Refusal(
                f"`{match.second}` is in training mode: it normalises by each batch and changes "
                "its statistics.",
                "Call model.eval() first.",
            )
    return None


def _channels_agree(_: Subject, match: Match) -> Refusal | None:
    for first, between, second in zip(match.firsts, match.between, match.seconds, strict=True):
        made = first.results[0]
        kernel = first.operands["weight"].shape[2:]
        # The channels come right before the kernel's axes, whether there is a batch or not; a
        # linear layer's come last.
        axis = len(made.shape) - 1 - len(kernel)
        if not keeps_channels(first, between, second, axis):
            moves = ", ".join(call.target for call in between)
            if moves and axis == 1:  # `axis 1, which is not axis 1` would be no help
                return Refusal(
                    f"Axis 1 of the input of `{match.second}` is not the channels of "
                    f"`{match.first}` in their order, moved by {moves}."
                )
            moved = f", moved by {moves}," if moves else ""
            return Refusal(
                f"`{match.second}` normalises axis 1 of its input, which is not the channel axis "
                f"({axis}) of the {len(made.shape)}-D output of `{match.first}`{moved} element "
                "by element.",
            )
    return None


def _dtypes_agree(_: Subject, match: Match) -> Refusal | None:
    for first, between, second in zip(match.firsts, match.between, match.seconds, strict=True):
        # The fold rounds once where the two rounded twice. In one dtype that is rounding as always;
        # in two, the result would be of the other one.
        made, normed = first.results[0].dtype, second.results[0].dtype
        for call in between:
            if call.results[0].dtype != made:
                return Refusal(
                    f"What `{match.first}` computes in {made} is rounded to "
                    f"{call.results[0].dtype} before `{match.second}`.",
                    "Use one dtype for both.",
                )
        if made != normed:
            return Refusal(
                f"`{match.first}` computes in {made} and `{match.second}` gives {normed}: folded, "
                f"the result would be rounded to {made}.",
                "Use one dtype for both.",
            )
    return None
