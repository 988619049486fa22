"""When may an activation move into the module before it? Every condition, with its reason.

Nothing is computed differently: one module of a fused class, which quantizers know by its type,
holds both. Keys of the first module change (`conv.weight` → `conv.0.weight`), hence on request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from torchfuse.judging.dataflow import other_readers
from torchfuse.rules._rule import Match, Refusal, Rule, Subject
from torchfuse.rules._unshared import read_by

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["merging_rule"]


def merging_rule(
    name: str, kind: str, classes: Mapping[type[nn.Module], type[nn.Module]], summary: str
) -> Rule:
    """The rule that puts a ReLU into the module before it, by a table of fused classes."""

    def check(subject: Subject, match: Match) -> Refusal | None:
        return _mergeable(subject, match, classes)

    def merge(first: nn.Module, second: nn.Module) -> nn.Module:
        return classes[type_before_parametrizations(first)](first, second)

    return Rule(name, (kind, "relu"), summary, check, rewrite=None, merge=merge)


def _mergeable(
    subject: Subject, match: Match, classes: Mapping[type[nn.Module], type[nn.Module]]
) -> Refusal | None:
    first, second = subject.modules[match.first], subject.modules[match.second]
    if type(second) is not nn.ReLU:
        return Refusal(
            f"The relu in `{match.second or 'the model'}` is no nn.ReLU module.", "Use nn.ReLU."
        )
    if type_before_parametrizations(first) not in classes:
        known = ", ".join(class_.__name__ for class_ in classes)
        return Refusal(
            f"`{match.first}` is a {type(first).__name__}; there are fused classes for {known}."
        )
    for module, path in ((first, match.first), (second, match.second)):
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return Refusal(f"A hook of `{path}` may depend on where it is.", "Remove the hook.")
    ours = {id(call) for call in match.firsts}
    for entry in subject.graph.module_calls_of(match.first):
        inside = subject.graph.calls[entry.first : entry.last]
        if any(id(call) not in ours for call in inside if call.module_path == match.first):
            return Refusal(
                f"`{match.first}` is called more than once, and not always right before "
                f"`{match.second}`.",
                "Give each use a module of its own.",
            )
    for layer, between, relu in zip(match.firsts, match.between, match.seconds, strict=True):
        if any(call.kind != "batch_norm" for call in between):
            return Refusal(f"Something lies between `{match.first}` and `{match.second}`.")
        for reader in other_readers(subject.graph, (layer, *between), relu):
            # What reads the memory after a ReLU in place reads the ReLU's output.
            if not (relu.written and reader.index > relu.index):
                return Refusal(read_by(match.first, reader))
    return None
