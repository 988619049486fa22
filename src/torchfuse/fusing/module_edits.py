"""Edits the user's own modules: one fusion in, and back out again, bit for bit."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from torchfuse.algebra.folding import fold_batch_norm
from torchfuse.errors import FusionError
from torchfuse.graph.parametrized import (
    computed_weight,
    is_state_dict_hook_of_torch,
    is_weight_hook,
    unparametrized,
)
from torchfuse.graph.retracing import is_retraced, leaves_it_to_torch, without_batch_norm
from torchfuse.isolation.model_copy import own_tables, shell
from torchfuse.isolation.snapshot import MODULE_TABLES, restored

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torchfuse.rules import Rule

__all__ = [
    "HOOK_TABLES",
    "Folded",
    "Fusions",
    "MergedBlock",
    "attach",
    "check_unchanged",
    "fold_in",
    "folded_layer",
    "folded_while_called",
    "forget_fusions",
    "fusions_of",
    "is_folded",
    "on_meta",
    "plain_layer",
    "put",
    "take_back",
    "was_fused",
    "without_memory",
    "without_norm",
]

_ATTRIBUTE = "_torchfuse_fusions"  # on the model itself; a plain object, so never in state_dict


@dataclass
class Folded:
    """One batch norm that was folded into one layer: what it takes to check it and to undo it."""

    first: tuple[str, ...]  # all paths of the layer
    second: tuple[str, ...]  # all paths of the batch norm
    layer: nn.Module  # as it was, without its memory (on the meta device)
    norm: nn.Module  # likewise
    original_layer: tuple[type[nn.Module], dict[str, Any]] | None  # class, attributes; None: gone
    original_norm: nn.Module | None

    @property
    def originals_bytes(self) -> int:
        """Memory of the originals, if they are kept."""
        if self.original_layer is None:
            return 0
        tensors = (*self.layer.parameters(), *self.layer.buffers())
        tensors += (*self.norm.parameters(), *self.norm.buffers())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass
class MergedBlock:
    """A module whose branches became one layer: what it takes to check it, and to undo it."""

    path: str
    base: tuple[Any, ...]  # of its class before, as `recipe_of` gives it
    source: str  # of its forward now
    args: tuple[tuple[tuple[int, ...], torch.dtype], ...]  # shapes and dtypes it was called with
    rules: tuple[str, ...]
    layers: tuple[str, ...]  # paths below it of the layers that came
    # By path below it: those whose place another one took, without their memory (on meta)
    modules: dict[str, nn.Module]
    tensors: dict[str, Tensor]  # by key below it: those that went from modules that stayed; on meta
    key_map: dict[str, str | None]  # keys below it
    written: dict[str, str]  # digests of the layers' tensors, by key below it
    original_modules: dict[str, nn.Module] | None  # None: not kept
    original_tensors: dict[str, Tensor] | None

    @property
    def originals_bytes(self) -> int:
        """Memory of the originals, if they are kept."""
        if self.original_modules is None or self.original_tensors is None:
            return 0
        tensors = [*self.original_tensors.values()]
        for module in self.original_modules.values():
            tensors += [*module._parameters.values(), *module._buffers.values()]  # type: ignore[list-item]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@dataclass
class Fusions:
    """What one call of a fusing verb did: all folds, then all blocks."""

    folded: list[Folded] = field(default_factory=list)
    blocks: tuple[MergedBlock, ...] = ()


def fusions_of(model: nn.Module) -> list[Fusions]:
    """What was done to `model`, one entry per call of a fusing verb."""
    return list(vars(model).get(_ATTRIBUTE, ()))


def attach(model: nn.Module, done: Fusions) -> None:
    """Remembers on the model what was done to it."""
    vars(model)[_ATTRIBUTE] = [*fusions_of(model), done]


def was_fused(model: nn.Module) -> bool:
    """Whether `model` came out of a fusing verb and was not unfused since."""
    return _ATTRIBUTE in vars(model)


def forget_fusions(model: nn.Module) -> None:
    """Drops the record: the model is as it was before."""
    vars(model).pop(_ATTRIBUTE, None)


def fold_in(
    model: nn.Module,
    rule: Rule,
    first: Sequence[str],
    second: Sequence[str],
    *,
    keep: bool,
    weights: tuple[Tensor, Tensor] | None = None,
) -> Folded:
    """Folds the batch norm at the paths `second` into the layer at the paths `first`, in place.

    `weights` are what the rule gives for them, if that is known.
    """
    layer, norm = model.get_submodule(first[0]), model.get_submodule(second[0])
    weight, bias = rule.rewrite(plain_layer(layer), norm) if weights is None else weights
    folded = Folded(
        first=tuple(first),
        second=tuple(second),
        layer=on_meta(layer),
        norm=on_meta(norm),
        original_layer=(type(layer), own_tables(vars(layer))) if keep else None,
        original_norm=norm if keep else None,
    )
    trains, bias_trains = _trains(layer, norm)
    _bake(layer)
    with torch.inference_mode(False):
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=trains)
        layer._parameters["bias"] = nn.Parameter(bias, requires_grad=bias_trains)
    put(model, second, without_norm(norm))
    return folded


@contextmanager
def folded_while_called(
    model: nn.Module, rule: Rule, first: Sequence[str], second: Sequence[str]
) -> Iterator[None]:
    """A context in which the batch norm is folded into the layer, whenever that is called.

    Between calls there is only the original weight, so that of many layers only one is in memory
    twice. A layer whose weight is computed is folded for as long as the context lasts.
    """
    layer: Any = model.get_submodule(first[0])
    norm = model.get_submodule(second[0])
    if not unparametrized(layer):
        folded = fold_in(model, rule, first, second, keep=True)
        try:
            yield
        finally:
            take_back(model, folded)
        return
    originals = (layer._parameters["weight"], layer._parameters["bias"])

    def fold(*_: Any) -> None:
        weights = rule.rewrite(layer, norm)
        for name, tensor in zip(("weight", "bias"), weights, strict=True):
            layer._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    def put_back(*_: Any) -> None:
        layer._parameters["weight"], layer._parameters["bias"] = originals

    handles = (
        layer.register_forward_pre_hook(fold),
        layer.register_forward_hook(put_back, always_call=True),
    )
    put(model, second, without_norm(norm))
    try:
        yield
    finally:
        put(model, second, norm)
        put_back()
        for handle in handles:
            handle.remove()


def check_unchanged(model: nn.Module) -> None:
    """Raises FusionError if originals are gone, or fused weights no longer what folding gave.

    A layer that took in two batch norms, in two calls, is looked at from the last one back.
    """
    before: dict[str, nn.Module] = {}
    for done in reversed(fusions_of(model)):
        for folded in reversed(done.folded):
            path = folded.first[0]
            layer = before.get(path, model.get_submodule(path))
            before[path] = _check_fold(folded, layer)


def _check_fold(folded: Folded, layer: Any) -> nn.Module:
    """The layer as it was before the fold."""
    name = f"`{folded.first[0]}`"
    if folded.original_layer is None:
        raise FusionError(
            f"{name} was fused with keep_originals=False, so its original weights are gone; load "
            "them from a checkpoint into a new model."
        )
    assert folded.original_norm is not None
    original = shell(*folded.original_layer)
    weight, bias = fold_batch_norm(plain_layer(original), folded.original_norm)
    if not (_identical(layer.weight, weight) and _identical(layer.bias, bias)):
        raise FusionError(
            f"The fused weights of {name} have changed since fuse() (trained, loaded, or moved "
            "to another dtype or device), so the originals no longer belong to them; unfuse "
            "before changing them, or load an unfused checkpoint with "
            "load_unfused_state_dict()."
        )
    return original


def take_back(model: nn.Module, folded: Folded) -> None:
    """Undoes `fold_in`, whatever became of the folded weights."""
    layer: Any = model.get_submodule(folded.first[0])
    norm = folded.original_norm
    assert folded.original_layer is not None
    assert norm is not None
    class_, attributes = folded.original_layer
    placeholder = model.get_submodule(folded.second[0])
    training = layer.training
    now, then = (
        (layer.weight.requires_grad, layer.bias.requires_grad),
        _trains(folded.layer, folded.norm),
    )
    hooks = {name: table for name, table in vars(layer).items() if name in HOOK_TABLES}
    for name, table in hooks.items():
        _keep_hooks_of_today(table, attributes[name])
    layer.__class__ = class_
    vars(layer).clear()
    vars(layer).update({**own_tables(attributes), **hooks}, training=training)
    norm.training = placeholder.training
    for name in HOOK_TABLES:
        vars(norm)[name].update(vars(placeholder)[name])
    put(model, folded.second, norm)
    for index, of_bias in enumerate((False, True)):
        if now[index] != then[index]:  # frozen, or made trainable, while it was fused
            for module in (layer, norm):
                for name, parameter in module.named_parameters():
                    if (name == "bias") == of_bias or not any(now):
                        parameter.requires_grad_(now[index])


# Dictionaries of hooks that every module has; handles refer to them, so they stay the same objects.
HOOK_TABLES = MODULE_TABLES - {"_parameters", "_buffers", "_modules"}


def _keep_hooks_of_today(table: dict[int, Any], original: dict[int, Any]) -> None:
    """Puts back, in place, the hooks that folding took off; what came or went since stays so."""
    taken_off = {
        key: hook
        for key, hook in original.items()
        if key not in table and (is_weight_hook(hook) or is_state_dict_hook_of_torch(hook))
    }
    today = dict(table)
    table.clear()
    table.update(taken_off)
    table.update(today)


def _trains(layer: nn.Module, norm: nn.Module) -> tuple[bool, bool]:
    """Whether the folded weight and bias are to be trained."""
    weight = any(p.requires_grad for name, p in layer.named_parameters() if name != "bias")
    owner = layer if layer.bias is not None else norm
    return weight, weight if owner.bias is None else bool(owner.bias.requires_grad)


def plain_layer(layer: nn.Module) -> nn.Module:
    """`layer` itself, or, if its weight is computed, a layer whose weight is a plain parameter."""
    if unparametrized(layer):
        return layer
    with restored(layer):
        weight = computed_weight(layer).clone()
    plain = shell(type(layer), vars(layer))
    _bake(plain)
    plain._parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=False)
    return plain


def folded_layer(
    layer: nn.Module, weight: Tensor, bias: Tensor, child: str | None = None
) -> nn.Module:
    """A layer like the plain `layer`, with these parameters and without hooks.

    `child` is the name of the batch norm, where it is one of the layer's own children.
    """
    folded = shell(type(layer), vars(layer))
    folded._forward_hooks.clear()
    if child is not None:
        put(folded, (child,), without_norm(layer.get_submodule(child)))
    folded._forward_pre_hooks.clear()
    folded._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    folded._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    return folded


def _identical(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def put(model: nn.Module, paths: Iterable[str], module: nn.Module) -> None:
    """Make `module` the child at each of these paths."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = module


def _bake(layer: nn.Module) -> None:
    """Takes parametrizations off, in place; the caller sets the weight."""
    if parametrize.is_parametrized(layer):
        # torch's own removal writes the computed weight into the original's memory.
        layer.__class__ = type(layer).__mro__[1]
        del layer._modules["parametrizations"]
    for hooks in (
        layer._state_dict_hooks,
        layer._state_dict_pre_hooks,
        layer._load_state_dict_pre_hooks,
        layer._load_state_dict_post_hooks,
    ):
        hooks.clear()  # all torch's: a layer with others is not folded
    for key, hook in list(layer._forward_pre_hooks.items()):
        if is_weight_hook(hook):
            del layer._forward_pre_hooks[key]
            for table in (layer._parameters, layer._buffers):
                for name in ("weight_g", "weight_v", "weight_u", "weight_orig"):
                    table.pop(name, None)
            vars(layer).pop("weight", None)


def on_meta(layer: nn.Module) -> nn.Module:
    """A copy of the layer without its memory, hooks included."""
    if not layer._modules:
        empty = shell(type(layer), vars(layer))
        tables: tuple[dict[str, Any], ...] = (empty._parameters, empty._buffers, vars(empty))
        for table in tables:
            for name, tensor in table.items():
                if isinstance(tensor, Tensor):
                    table[name] = without_memory(tensor)
        return empty
    memo: dict[int, Any] = {}
    for module in layer.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                memo[id(tensor)] = without_memory(tensor)
        for value in vars(module).values():
            if isinstance(value, Tensor):
                memo[id(value)] = without_memory(value)
    return copy.deepcopy(layer, memo)


def without_memory(tensor: Tensor) -> Tensor:
    """The same on the meta device."""
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


class _Passing(_BatchNorm):
    """A batch norm whose normalising was folded away: what a subclass adds still runs."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in torch
        return input

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _passing_object, (type(self).__mro__[1],), self.__dict__


def _passing_object(subclass: type[nn.Module]) -> nn.Module:
    # In the method resolution order, `_Passing` comes right before torch's own `_BatchNorm`, so
    # that the subclass's super().forward(x) reaches it.
    namespace = {"__module__": subclass.__module__, "__reduce_ex__": _Passing.__reduce_ex__}
    class_: Any = type(subclass.__name__, (subclass, _Passing), namespace)
    passing = class_.__new__(class_)
    assert isinstance(passing, nn.Module)
    return passing


def is_folded(module: nn.Module) -> bool:
    """Whether the module is what stayed of a batch norm that was folded."""
    return isinstance(module, _Passing) or is_retraced(module)


def without_norm(norm: nn.Module) -> nn.Module:
    """What stays where the batch norm was: an Identity, or what its subclass adds."""
    if not isinstance(norm, _BatchNorm) or type(norm).forward in (
        _BatchNorm.forward,
        nn.SyncBatchNorm.forward,
    ):
        return nn.Identity().train(norm.training)
    if not leaves_it_to_torch(norm):
        return without_batch_norm(norm)
    rest = _passing_object(type(norm))
    vars(rest).update(own_tables(vars(norm)))
    rest._parameters.update(weight=None, bias=None)
    rest._buffers.update(running_mean=None, running_var=None, num_batches_tracked=None)
    vars(rest).update(affine=False, track_running_stats=False)
    return rest
