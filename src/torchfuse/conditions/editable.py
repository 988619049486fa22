"""Can the two modules of a fold be edited? Each reason why not.

What a class, a hook, or an attribute adds to a layer or a batch norm must not be lost with it.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from torchfuse.conditions.sources import functions_of, is_setup, names_in, syntax_of
from torchfuse.conditions.subject import Match, Refusal, Subject, same_tensor
from torchfuse.errors import UnsupportedError
from torchfuse.graph.norm_modules import NORM_TENSORS, is_norm_module
from torchfuse.graph.parametrized import is_state_dict_hook_of_torch
from torchfuse.graph.retracing import leaves_it_to_torch, operations, traced, without_batch_norm

if TYPE_CHECKING:
    from types import CodeType

    from torchfuse.graph import Call

__all__ = ["layer_is_a_module", "no_hook_renames_keys", "norm_is_a_module"]

_LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)

_SUBCLASS_HINT = "Let it call super().forward(x), or move what it adds into a module of its own."
_REWRITE_ONLY = "Use torchfuse.fuse_exported, which can rewrite function calls, or use a module."


def norm_is_a_module(subject: Subject, match: Match) -> Refusal | None:
    """Whether the batch norm can be taken out: a module that does nothing else, without hooks."""
    norm = subject.modules[match.second]
    if not (is_norm_module(norm) or isinstance(norm, _BatchNorm)) or any(
        call.module_path != match.second for call in match.seconds
    ):
        return Refusal(
            f"The batch norm in `{match.seconds[0].module_path or 'the model'}` is a function "
            "call; only rewriting the graph could remove it.",
            _REWRITE_ONLY,
        )
    if (held := _held_elsewhere(subject, match.second)) is not None:
        return held
    # An identity stands where the norm was, and is given what the folded layer makes: a hook would
    # see that in place of what the layer made.
    if norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks:
        return Refusal(
            f"A hook of `{match.second}` sees its input, which folding changes.",
            "Remove the hook, or put it on what follows.",
        )
    if _has_state_dict_hooks(norm):
        return Refusal(f"`{match.second}` has state_dict hooks, which would be lost.")
    # What else it holds would go with it, and be missing in the state dict.
    added = [*norm._modules, *sorted({*norm._parameters, *norm._buffers} - NORM_TENSORS)]
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
    if not isinstance(norm, _BatchNorm):
        return _does_more(subject, match) or _reads_tensors(match, norm)
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


def no_hook_renames_keys(subject: Subject, match: Match) -> Refusal | None:
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


def _does_more(subject: Subject, match: Match) -> Refusal | None:
    """None if each call of a norm of a class of its own is a batch norm, and nothing else."""
    graph = subject.graph
    for entry in graph.module_calls_of(match.second):
        inside = graph.calls[entry.first : entry.last]
        if len(inside) != 1 or inside[0] not in match.seconds or entry.outputs != inside[0].outputs:
            return Refusal(
                f"`{match.second}` is a {type(subject.modules[match.second]).__name__}, whose own "
                "forward does more than a batch norm.",
                "Move what it adds into a module of its own.",
            )
    return None


def _subclass(subject: Subject, match: Match, norm: _BatchNorm) -> Refusal | None:
    """A subclass keeps what it adds, if it calls torch's own forward and nothing of the norm's."""
    hint = _SUBCLASS_HINT
    if not leaves_it_to_torch(norm):
        try:
            graph = traced(norm)
            functions, children = operations(graph)
            without_batch_norm(norm, graph)
        except UnsupportedError as error:
            return Refusal(
                f"`{match.second}` is a {type(norm).__name__}, whose own forward {error}.", hint
            )
        return _not_as_traced(subject, match, functions, children) or _reads_tensors(match, norm)
    forward = type(norm).forward
    reaches_super = all(
        any(f.code is _BatchNorm.forward.__code__ for f in call.frames) for call in match.seconds
    )
    names = {*forward.__code__.co_names} & {
        *NORM_TENSORS,
        *("eps", "num_features", "affine", "momentum"),
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


def _not_as_traced(
    subject: Subject, match: Match, functions: list[str], children: list[str]
) -> Refusal | None:
    """None if every call of the norm did what tracing its forward says that it does.

    Tracing asks with symbols: a forward that asks for a type, or a dtype, takes another path.
    """
    graph = subject.graph
    for entry in graph.module_calls_of(match.second):
        index = graph.module_calls.index(entry)
        inside = graph.calls[entry.first : entry.last]
        # Kinds in their order tell one path from another; what hooks and checks add does not
        # compute.
        own = [call.kind for call in inside if call.within == index]
        ran = [kind for kind in own if kind not in ("hook", "held", "_assert")]
        called = [e.path for e in graph.module_calls if e.parent == index]
        named = [_first_path(subject, f"{match.second}.{name}") for name in children]
        if ran != functions or called != named:
            return Refusal(
                f"`{match.second}` is a {type(subject.modules[match.second]).__name__}, whose own "
                "forward does something else when it is traced.",
                _SUBCLASS_HINT,
            )
    return None


def _first_path(subject: Subject, path: str) -> str:
    return next(first for first, names in subject.graph.paths.items() if path in names)


def _reads_tensors(match: Match, norm: nn.Module) -> Refusal | None:
    """None if no other method of the norm's class reads what is gone once it is folded."""
    class_: Any = type(norm)  # mypy takes nn.Module's own __hash__ for its class's
    for name, function in functions_of(class_):
        named = names_in(function.__code__) & NORM_TENSORS
        if name != "forward" and named and not is_setup(name) and not name.startswith("_"):
            return Refusal(
                f"`{match.second}` is a {type(norm).__name__}, whose method {name} reads "
                f"`{min(named)}`.",
                "Remove the method.",
            )
    return None


def layer_is_a_module(subject: Subject, match: Match) -> Refusal | None:
    """Whether the layer can be given other weights: a module that does nothing but its call."""
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
    if match.child is not None and (refusal := _holds_more(match, layer)) is not None:
        return refusal
    if _has_state_dict_hooks(layer):
        return Refusal(f"`{match.first}` has state_dict hooks, which may not fit a folded layer.")
    return None


def _holds_more(match: Match, layer: nn.Module) -> Refusal | None:
    """None if a layer that holds its batch norm has no other weights, nor another use of its own.

    What reads its weight in a method of its own would find it folded, without a trace outside.
    """
    hint = "Move what it adds into a module of its own."
    for name, child in layer.named_children():
        if name != match.child and child.state_dict():
            return Refusal(
                f"`{match.first}` holds its batch norm and another module with weights, `{name}`.",
                hint,
            )
    class_: Any = type(layer)  # mypy takes nn.Module's own __hash__ for its class's
    for name, function in functions_of(class_):
        named = names_in(function.__code__) & {"weight", "bias", match.child}
        if named and name != "forward" and not is_setup(name):
            return Refusal(
                f"`{match.first}` is a {class_.__name__}, which holds its batch norm, and whose "
                f"method {name} reads `{min(map(str, named))}`.",
                hint,
            )
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
        return any(same_tensor(subject, name, layer, "bias") for name in names)
    # The layer has no bias yet, so nothing recorded shows where one would go: that is read in the
    # forwards that it went through.
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
