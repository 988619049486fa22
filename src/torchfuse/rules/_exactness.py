"""When is it exact to fold a batch norm into the layer before it? Every condition, with its reason.

Conditions are about what was recorded, and about the modules as they are. What the code could do
on other ways through it is the question of `branches.py` and `methods.py`.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from torchfuse.judging.dataflow import keeps_channels, other_readers
from torchfuse.judging.sources import names_in, syntax_of
from torchfuse.parametrized import (
    computed_weight,
    is_state_dict_hook_of_torch,
    unparametrized,
)
from torchfuse.restoring import restored
from torchfuse.rules._rule import Match, Refusal, Subject

if TYPE_CHECKING:
    from types import CodeType

    from torchfuse.graph import Call

__all__ = ["exact_in_graph", "foldable", "read_by"]

_LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)

_REWRITE_ONLY = "Use torchfuse.fuse_exported, which can rewrite function calls, or use a module."


def foldable(subject: Subject, match: Match) -> Refusal | None:
    """None if the match can be folded exactly within what was recorded; otherwise why not."""
    for condition in (
        _no_threads,
        _norm_uses_statistics,
        _norm_is_a_module,
        _layer_is_a_module,
        _no_hook_renames_keys,
        _always_together,
        _nobody_else_reads,
        _weight_is_its_own,
        _statistics_are_its_own,
        _channels_agree,
        _dtypes_agree,
    ):
        if (refusal := condition(subject, match)) is not None:
            return refusal
    return None


def exact_in_graph(subject: Subject, match: Match) -> Refusal | None:
    """None if the match is exact where each call can be given weights of its own, as in a graph.

    What only matters where modules are edited (who else calls them, hooks, subclasses) is not
    asked for: `subject` may be without modules.
    """
    for condition in (
        _norm_uses_statistics,
        _parameters_are_stored,
        _nobody_else_reads,
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
            if any(value.index in writer.written for writer in graph.writers(value.index)):
                return Refusal(f"The {role} of `{path}` changes during the pass.")
    return None


def _no_threads(subject: Subject, _: Match) -> Refusal | None:
    if subject.graph.threads:
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


def _norm_is_a_module(subject: Subject, match: Match) -> Refusal | None:
    norm = subject.modules[match.second]
    if not isinstance(norm, _BatchNorm) or any(
        call.module_path != match.second for call in match.seconds
    ):
        return Refusal(
            f"The batch norm in `{match.seconds[0].module_path or 'the model'}` is a function "
            "call; only rewriting the graph could remove it.",
            _REWRITE_ONLY,
        )
    if (held := _held_elsewhere(subject, match.second)) is not None:
        return held
    if norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks:
        return Refusal(
            f"A hook of `{match.second}` sees its input, which folding changes.",
            "Remove the hook, or put it on what follows.",
        )
    if _has_state_dict_hooks(norm):
        return Refusal(f"`{match.second}` has state_dict hooks, which would be lost.")
    own = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    added = [*norm._modules, *sorted({*norm._parameters, *norm._buffers} - own)]
    if type(norm).get_extra_state is not nn.Module.get_extra_state:
        added.append("extra state")
    if parametrize.is_parametrized(norm):
        return Refusal(
            f"`{match.second}` is parametrized.",
            "Remove the parametrization first (torch.nn.utils.parametrize).",
        )
    for name in ("forward", "__call__"):
        if name in vars(norm) or (
            name == "__call__" and type(norm).__call__ is not nn.Module.__call__
        ):
            return Refusal(
                f"`{match.second}` has a {name} of its own, which would be lost.",
                "Move what it adds into a module of its own.",
            )
    if type(norm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return _subclass(subject, match, norm)
    if added:
        return Refusal(f"`{match.second}` also holds {added[0]}, which would be lost.")
    return None


def _held_elsewhere(subject: Subject, path: str) -> Refusal | None:
    if path not in subject.holders:
        return None
    return Refusal(
        f"`{path}` is also held by the plain attribute `{subject.holders[path]}`, through which it "
        "would still be called.",
        "Hold it only as a submodule.",
    )


def _has_state_dict_hooks(module: nn.Module) -> bool:
    return bool(_state_dict_hooks(module))


def _state_dict_hooks(module: nn.Module) -> list[Any]:
    """Those that are not of torch's own weight norms, which go when these are baked in."""
    hooks = [
        *module._state_dict_hooks.values(),
        *module._state_dict_pre_hooks.values(),
        *module._load_state_dict_pre_hooks.values(),
        *module._load_state_dict_post_hooks.values(),
    ]
    return [hook for hook in hooks if not is_state_dict_hook_of_torch(hook)]


def _no_hook_renames_keys(subject: Subject, match: Match) -> Refusal | None:
    """No state_dict hook of a module around the two names a key of theirs."""
    for path in match.modules:
        around = path
        while around:
            around = around.rpartition(".")[0]
            own = path.removeprefix(f"{around}.").rpartition(".")[2]
            for hook in _state_dict_hooks(subject.modules[around]):
                hook = getattr(hook, "hook", hook)  # torch wraps some
                code = getattr(getattr(hook, "__func__", hook), "__code__", None)
                words = {w for text in names_in(code) for w in text.split(".")} if code else {own}
                if own in words:
                    return Refusal(
                        f"A state_dict hook of `{around or 'the model'}` handles keys of `{path}`, "
                        "which folding changes.",
                        "Remove the hook.",
                    )
    return None


def _subclass(subject: Subject, match: Match, norm: _BatchNorm) -> Refusal | None:
    """A subclass keeps what it adds, if it calls torch's own forward and nothing of the norm's."""
    hint = "Let it call super().forward(x), or move what it adds into a module of its own."
    forward = type(norm).forward
    reaches_super = all(
        any(f.code is _BatchNorm.forward.__code__ for f in call.frames) for call in match.seconds
    )
    names = {*forward.__code__.co_names} & {
        *("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "eps"),
        *("num_features", "affine", "momentum"),
    }
    own = [f for call in match.seconds for f in call.frames if not f.module.startswith("torch.")]
    bases = {base.__name__ for base in type(norm).__mro__}
    past = any("super" not in f.code.co_names or bases & {*f.code.co_names} for f in own)
    if not reaches_super or names or past:
        return Refusal(
            f"`{match.second}` is a {type(norm).__name__}, a subclass whose own forward does more "
            "than a batch norm.",
            hint,
        )
    for call in match.seconds:
        inside = [c for c in subject.graph.module_calls_of(match.second) if c.case == call.case]
        if not any(call.operands["input"].value in c.inputs for c in inside):
            return Refusal(
                f"`{match.second}` is a {type(norm).__name__}, a subclass that changes its input "
                "before it normalises it.",
                hint,
            )
    return None


def _layer_is_a_module(subject: Subject, match: Match) -> Refusal | None:
    layer = subject.modules[match.first]
    if _is_pruned(layer):
        return Refusal(
            f"The weight of `{match.first}` is pruned anew, by a hook, at every call.",
            "Make the pruning permanent first: torch.nn.utils.prune.remove(layer, 'weight').",
        )
    for call in match.firsts:
        if not isinstance(layer, _LAYERS) or call.module_path != match.first:
            return Refusal(
                f"The {call.kind} in `{call.module_path or 'the model'}` is a function call; only "
                "rewriting the graph could add the bias that folding needs.",
                _REWRITE_ONLY,
            )
        if not _passes_bias(subject, layer, call):
            return Refusal(
                f"`{match.first}` ({type(layer).__name__}) does not pass its bias on as it is, and "
                "folding needs one.",
                "Pass self.bias in its forward.",
            )
    if (held := _held_elsewhere(subject, match.first)) is not None:
        return held
    if _has_state_dict_hooks(layer):
        return Refusal(f"`{match.first}` has state_dict hooks, which may not fit a folded layer.")
    return None


def _is_pruned(layer: nn.Module) -> bool:
    return any(isinstance(hook, BasePruningMethod) for hook in layer._forward_pre_hooks.values())


def _passes_bias(subject: Subject, layer: Any, call: Call) -> bool:
    """Whether a bias that the layer has, or is given, reaches the function just as it is."""
    if layer.bias is not None:
        operand = call.operands.get("bias")
        if operand is None:
            return False
        names = subject.graph.values[operand.value].names
        return any(_same(subject, name, layer, "bias") for name in names)
    own = [frame.code for frame in call.frames if not frame.module.startswith("torch.")]
    handed = [_hands_bias_on(code) for code in own if "bias" in names_in(code)]
    if not all(handed):
        return False
    # torch's own forward, by itself or through super(), hands it on too
    torchs = any(frame.module.startswith("torch.nn.modules.") for frame in call.frames)
    return torchs or bool(handed)


def _hands_bias_on(code: CodeType) -> bool:
    """Whether every mention of a bias is an argument, or in `self.bias if … is None else …`."""
    tree = syntax_of(code)
    if tree is None:
        return False
    handed = [
        argument
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for argument in (*node.args, *(keyword.value for keyword in node.keywords))
    ]
    for choice in [node for node in handed if isinstance(node, ast.IfExp)]:
        handed += [choice.body, choice.orelse]
        if isinstance(choice.test, ast.Compare):
            handed.append(choice.test.left)
    mentions = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "bias"]
    return bool(mentions) and all(any(m is h for h in handed) for m in mentions)


def _always_together(subject: Subject, match: Match) -> Refusal | None:
    """Every call of the layer is followed by the norm, every call of the norm follows the layer."""
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


def _nobody_else_reads(subject: Subject, match: Match) -> Refusal | None:
    for first, between, second in zip(match.firsts, match.between, match.seconds, strict=True):
        for reader in other_readers(subject.graph, (first, *between), second):
            return Refusal(
                read_by(match.first, reader),
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


def read_by(layer: str, reader: Call) -> str:
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


def _weight_is_its_own(subject: Subject, match: Match) -> Refusal | None:
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
            if not any(_same(subject, name, layer, "weight") for name in names):
                return Refusal(
                    f"`{match.first}` ({type(layer).__name__}) computes the weight it uses.",
                    "Make it a parametrization (torch.nn.utils.parametrize): those are baked in.",
                )
    ours = {id(call) for call in match.firsts}
    inside = {id(module) for module in layer.modules()}
    for name, _ in layer.named_parameters():
        value = subject.graph.value_named(f"{match.first}.{name}" if match.first else name)
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


def _same(subject: Subject, name: str, layer: nn.Module, attribute: str) -> bool:
    path, _, last = name.rpartition(".")
    return subject.modules[path] is layer and last == attribute


def _statistics_are_its_own(subject: Subject, match: Match) -> Refusal | None:
    norm = subject.modules[match.second]
    ours = {id(call) for call in match.seconds}
    graph = subject.graph
    for call in match.seconds:
        for role in ("running_mean", "running_var", "weight", "bias"):
            if role not in call.operands:
                continue
            value = graph.values[call.operands[role].value]
            if not any(_same(subject, name, norm, role) for name in value.names):
                return Refusal(f"The {role} of `{match.second}` is computed, not stored.")
            shared = [n for n in value.names if not _same(subject, n, norm, role)]
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


def _channels_agree(_: Subject, match: Match) -> Refusal | None:
    for first, between, second in zip(match.firsts, match.between, match.seconds, strict=True):
        made = first.results[0]
        kernel = first.operands["weight"].shape[2:]
        axis = len(made.shape) - 1 - len(kernel)
        if not keeps_channels(first, between, second, axis):
            moved = f", moved by {', '.join(c.target for c in between)}," if between else ""
            return Refusal(
                f"`{match.second}` normalises axis 1 of its input, which is not the channel axis "
                f"({axis}) of the {len(made.shape)}-D output of `{match.first}`{moved} element "
                "by element.",
            )
    return None


def _dtypes_agree(_: Subject, match: Match) -> Refusal | None:
    for first, between, second in zip(match.firsts, match.between, match.seconds, strict=True):
        made, normed = first.results[0].dtype, second.results[0].dtype
        for call in between:
            if any(result.dtype != made for result in call.results):
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
        weight = first.operands["weight"].dtype
        if not getattr(torch, weight).is_floating_point:
            return Refusal(f"The weight of `{match.first}` is {weight}, not a real number.")
    return None
