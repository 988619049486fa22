"""Does anything else use what a fold changes? Each use, as a sentence.

The output of the layer, its weight and bias, the statistics and parameters of the batch norm: each
must be read by the two alone, always one after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import parametrize

from torchfuse.conditions.dataflow import other_readers
from torchfuse.conditions.subject import Match, Refusal, Subject, same_tensor
from torchfuse.graph.parametrized import computed_weight, unparametrized
from torchfuse.isolation.snapshot import restored

if TYPE_CHECKING:
    from torchfuse.graph import Call

__all__ = [
    "always_together",
    "nobody_else_reads",
    "nobody_else_reads_the_weight",
    "statistics_are_its_own",
    "weight_is_its_own",
]


def always_together(subject: Subject, match: Match) -> Refusal | None:
    """Every call of the layer is followed by the norm, every call of the norm follows the layer."""
    # By the weight and not by the module: `F.conv2d(x, self.conv.weight)` calls it as well.
    graph = subject.graph
    ours = {id(call) for call in match.firsts}
    for call in match.firsts:
        for reader in graph.readers(call.operands["weight"].value):
            if _computes_weight(subject, match.first, reader):
                continue
            if id(reader) not in ours:
                if reader.module_path == match.first:
                    return _called_apart(match)
                return Refusal(
                    f"The weight of `{match.first}` is also read by {_described(reader)}.",
                    "Give each use a weight of its own.",
                )
    # A parametrization computes another weight for each call: look for the calls, too.
    for entry in graph.module_calls_of(match.first):
        for call in graph.calls[entry.first : entry.last]:
            same = call.module_path == match.first and call.kind == match.firsts[0].kind
            if same and id(call) not in ours:
                return _called_apart(match)
    return None


def _computes_weight(subject: Subject, path: str, reader: Call) -> bool:
    """Whether a reader of the weight that the layer used is a part of what computed it."""
    if unparametrized(subject.modules[path]):
        return False
    # A weight hook leaves the weight in an attribute; a parametrization may look at its result.
    return reader.kind == "held" or (reader.module_path or "").startswith(f"{path}.")


def _called_apart(match: Match) -> Refusal:
    return Refusal(
        f"`{match.first}` is called more than once, and not always right before `{match.second}`.",
        "Give each use a layer of its own.",
    )


def nobody_else_reads(subject: Subject, match: Match) -> Refusal | None:
    """Whether what the layer puts out goes to the batch norm alone."""
    for first, between, second in zip(match.firsts, match.between, match.seconds, strict=True):
        for reader in other_readers(subject.graph, (first, *between), second):
            return Refusal(
                _read_by(match.first, reader),
                ""
                if reader.kind == "output"
                else "Let the other use read the batch norm's output.",
            )
        for call in between:
            if call.kind == "dropout" and _is_active(call):
                return Refusal(
                    f"The dropout between `{match.first}` and `{match.second}` is in training "
                    "mode.",
                    "Call model.eval() first.",
                )
    return None


def _is_active(dropout: Call) -> bool:
    functional = getattr(dropout.function, "__module__", "") == "torch.nn.functional"
    return bool(dropout.attributes.get("training", functional))


def _read_by(layer: str, reader: Call) -> str:
    """Who else reads the output of `layer`, as a sentence."""
    output = f"The output of `{layer}` is also"
    if reader.kind == "output":
        return f"{output} an output of the model."
    if reader.kind == "held":
        return f"{output} kept alive after the pass: an attribute, list or closure holds it."
    if reader.kind == "hook":
        return f"{output} seen by a hook ({reader.target})."
    if reader.kind == "unseen":
        return f"{output} read outside torch's Python functions ({reader.target})."
    return f"{output} read by {_described(reader)}."


def _described(reader: Call) -> str:
    if reader.kind == "unseen":
        return f"what cannot be followed ({reader.target})"
    if reader.kind in ("output", "held", "hook"):
        return f"{reader.kind} ({reader.target})"
    where = f" in `{reader.module_path}`" if reader.module_path else ""
    return f"another use: {reader.target}{where}"


def weight_is_its_own(subject: Subject, match: Match) -> Refusal | None:
    """Whether the layer's weight and bias are tensors that may be written, of no other layer's."""
    layer = subject.modules[match.first]
    if parametrize.is_parametrized(layer) and (
        not parametrize.is_parametrized(layer, "weight") or len(layer.parametrizations) > 1  # type: ignore[arg-type]
    ):
        return Refusal(f"The bias of `{match.first}` is parametrized.")
    if not unparametrized(layer):
        if any(module.training for module in layer.modules()):
            return Refusal(
                f"The weight of `{match.first}` is computed, and may change, in training mode.",
                "Call model.eval() first.",
            )
        # What draws random numbers, or counts its calls, cannot be baked in as one weight.
        with restored(layer):
            if not torch.equal(computed_weight(layer), computed_weight(layer)):
                return Refusal(
                    f"The weight of `{match.first}` is computed anew, and differently, at every "
                    "call.",
                )
    elif not isinstance(layer.weight, nn.Parameter):
        return Refusal(f"The weight of `{match.first}` is no parameter.")
    else:
        for call in match.firsts:
            names = subject.graph.values[call.operands["weight"].value].names
            if not any(same_tensor(subject, name, layer, "weight") for name in names):
                return Refusal(
                    f"`{match.first}` ({type(layer).__name__}) computes the weight it uses.",
                    "Make it a parametrization (torch.nn.utils.parametrize): those are baked in.",
                )
    return nobody_else_reads_the_weight(subject, match)


def nobody_else_reads_the_weight(subject: Subject, match: Match) -> Refusal | None:
    """Whether no call but the layer's own reads its parameters."""
    layer = subject.modules[match.first]
    ours = {id(call) for call in match.firsts}
    inside = {id(module) for module in layer.modules()}
    norm = f"{match.child}." if match.child is not None else None
    for name, _ in layer.named_parameters():
        if norm is not None and name.startswith(norm):
            continue  # (the norm's own are looked at as the norm's)
        value = subject.graph.value_named(f"{match.first}.{name}" if match.first else name)
        # Tied parameters are one value with several names; only a fold of all of them would be
        # right, and each has another norm behind it.
        outside = [n for n in value.names if id(_owner(subject, n)) not in inside]
        outside += [a for a in value.attributes if id(_owner(subject, a)) not in inside]
        twins = {n.rpartition(".")[2] for n in value.names}
        if outside or len(twins) > 1:
            return Refusal(
                f"The weight or bias of `{match.first}` is shared with "
                f"`{(outside or value.names)[0]}` (tied).",
                "Untie them, if they need not stay equal.",
            )
        for reader in subject.graph.readers(value.index):
            path = reader.module_path
            if id(reader) in ours:
                continue
            computing = not unparametrized(layer) and path is not None
            if not computing or id(subject.modules[path or ""]) not in inside:
                return Refusal(
                    f"The weight or bias of `{match.first}` is also read by {_described(reader)}."
                )
            # A read of a parametrized `.weight` from elsewhere computes it in the same modules.
            if parametrize.is_parametrized(layer) and not any(
                call.first <= reader.index < call.last
                for call in subject.graph.module_calls_of(match.first)
            ):
                return Refusal(
                    f"The weight of `{match.first}`, which is parametrized, is also read outside "
                    "of its calls."
                )
        if any(value.index in call.written for call in subject.graph.writers(value.index)):
            return Refusal(f"A parameter of `{match.first}` is changed during the pass.")
    return None


def _owner(subject: Subject, name: str) -> nn.Module:
    return subject.modules[name.rpartition(".")[0]]


def statistics_are_its_own(subject: Subject, match: Match) -> Refusal | None:
    """Whether no call but the batch norm's own reads or writes its tensors."""
    norm = subject.modules[match.second]
    ours = {id(call) for call in match.seconds}
    graph = subject.graph
    for call in match.seconds:
        for role in ("running_mean", "running_var", "weight", "bias"):
            if role not in call.operands:
                continue
            value = graph.values[call.operands[role].value]
            if not any(same_tensor(subject, name, norm, role) for name in value.names):
                return Refusal(f"The {role} of `{match.second}` is computed, not stored.")
            # Another norm with these statistics keeps them; but who shares them may also load or
            # retrain them, and the folded layer would not follow.
            shared = [n for n in value.names if not same_tensor(subject, n, norm, role)]
            if shared or value.attributes:
                return Refusal(
                    f"The {role} of `{match.second}` is shared with "
                    f"`{(shared or list(value.attributes))[0]}`.",
                    "Give each batch norm statistics and parameters of its own.",
                )
            if any(value.index in writer.written for writer in graph.writers(value.index)):
                return Refusal(f"The {role} of `{match.second}` changes during the pass.")
            for reader in graph.readers(value.index):
                if id(reader) in ours:
                    continue
                if reader.module_path == match.second and reader.kind == "batch_norm":
                    return Refusal(
                        f"`{match.second}` is called more than once, and not always after "
                        f"`{match.first}`.",
                        "Give each use a batch norm of its own.",
                    )
                return Refusal(
                    f"The {role} of `{match.second}` is also read by {_described(reader)}."
                )
    return None
