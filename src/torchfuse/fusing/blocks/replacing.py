"""Puts what was merged into a block in place, and takes it back, bit for bit."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchfuse.errors import FusionError
from torchfuse.fusing.module_edits import (
    HOOK_TABLES,
    MergedBlock,
    fusions_of,
    on_meta,
    put,
    without_memory,
    without_norm,
)
from torchfuse.graph.retracing import class_of, recipe_of, retraced_class
from torchfuse.planning import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torchfuse.fusing.blocks.merged import Exports, Merge

__all__ = [
    "blocks_checked",
    "blocks_loaded",
    "replace_block",
    "take_block_back",
    "without_originals",
]


def replace_block(
    model: nn.Module,
    path: str,
    merge: Merge,
    args: Sequence[Tensor],
    rules: Sequence[str],
) -> MergedBlock:
    """Make the module at `path` what `merge` says, in place; the originals are kept."""
    block = model.get_submodule(path)
    modules: dict[str, nn.Module] = {}
    tensors: dict[str, Tensor] = {}
    for below, layer in merge.layers.items():
        modules[below] = block.get_submodule(below)
        put(block, (below,), layer)
    for below, names in merge.absorbed.items():
        module = block.get_submodule(below)
        if below and isinstance(module, _BatchNorm):
            # A norm class that does more (an activation) goes on doing that.
            modules[below] = module
            put(block, (below,), without_norm(module))
        elif below and not module._modules:
            # An identity keeps the path, so that keys and indices of what follows stay as they are.
            modules[below] = module
            put(block, (below,), nn.Identity().train(module.training))
        else:
            for name in names:
                table = module._parameters if name in module._parameters else module._buffers
                tensor = table[name]
                assert tensor is not None
                tensors[f"{below}.{name}" if below else name] = tensor
                table[name] = None
    base = type(block)
    block.__class__ = retraced_class(base, merge.source, merge.names)
    return MergedBlock(
        path=path,
        base=recipe_of(base),
        source=merge.source,
        args=tuple((tuple(arg.shape), arg.dtype) for arg in args),
        rules=tuple(rules),
        layers=tuple(merge.layers),
        modules={below: on_meta(module) for below, module in modules.items()},
        tensors={key: without_memory(tensor) for key, tensor in tensors.items()},
        key_map=merge.key_map,
        written=_digests(block, tuple(merge.layers)),
        original_modules=modules,
        original_tensors=tensors,
    )


def without_originals(done: MergedBlock) -> MergedBlock:
    """The same, not to be undone."""
    return replace(done, original_modules=None, original_tensors=None)


def take_block_back(model: nn.Module, done: MergedBlock) -> None:
    """Undo `replace_block`, whatever became of the merged layers' weights."""
    assert done.original_modules is not None
    assert done.original_tensors is not None
    block = model.get_submodule(done.path)
    trains = _trains(block, done.layers)
    for below, module in done.original_modules.items():
        today = block.get_submodule(below)
        # What was set while it was fused (eval, hooks) is of the module at this place, and stays.
        module.training = today.training
        for name in HOOK_TABLES:
            vars(module)[name].update(vars(today)[name])
        put(block, (below,), module)
    _put_tensors(block, done.original_tensors)
    block.__class__ = class_of(done.base)
    originals = [
        *(p for module in done.original_modules.values() for p in module.parameters(recurse=False)),
        *(t for t in done.original_tensors.values() if isinstance(t, nn.Parameter)),
    ]
    if trains != any(parameter.requires_grad for parameter in originals):
        for parameter in originals:  # frozen, or made trainable, while it was fused
            parameter.requires_grad_(trains)


@contextmanager
def blocks_checked(model: nn.Module) -> Iterator[None]:
    """A context in which no block is merged.

    Raises:
        FusionError: originals are gone, or merged weights are no longer what they were.
    """
    with ExitStack() as stack:
        for done in _last_first(model):
            block, name = model.get_submodule(done.path), f"`{done.path}`"
            if done.original_modules is None or done.original_tensors is None:
                raise FusionError(
                    f"{name} was fused with keep_originals=False, so its original weights are "
                    "gone; load them from a checkpoint into a new model."
                )
            if _digests(block, done.layers) != done.written:
                raise FusionError(
                    f"The fused weights of {name} have changed since fuse() (trained, loaded, or "
                    "moved to another dtype or device), so the originals no longer belong to "
                    "them; unfuse before changing them, or load an unfused checkpoint with "
                    "load_unfused_state_dict()."
                )
            stack.enter_context(_with(block, done, done.original_modules, done.original_tensors))
        yield


@contextmanager
def blocks_loaded(model: nn.Module) -> Iterator[None]:
    """A context in which no block is merged; afterwards all are again, from the values by then.

    Where originals were not kept, modules without values stand for them. If the context raises,
    all is as it was.
    """
    exports: Exports = {}
    with ExitStack() as stack:
        for done in _last_first(model):
            stack.enter_context(_loaded(model.get_submodule(done.path), done, exports))
        yield


def _last_first(model: nn.Module) -> Iterator[MergedBlock]:
    for fusions in reversed(fusions_of(model)):
        yield from reversed(fusions.blocks)


@contextmanager
def _loaded(block: nn.Module, done: MergedBlock, exports: Exports) -> Iterator[None]:
    # Imported here: most models have no such blocks, and torch.export takes a while.
    from torchfuse.fusing.blocks.merged import merged

    device = next(block.get_submodule(done.layers[0]).parameters()).device
    modules, tensors = done.original_modules, done.original_tensors
    if modules is None or tensors is None:
        modules = {p: on_meta(module).to_empty(device=device) for p, module in done.modules.items()}
        tensors = {key: _empty(tensor, device) for key, tensor in done.tensors.items()}
    # Merged anew of the loaded weights, and not proved again: what is merged is the same.
    with _with(block, done, modules, tensors):
        yield
        args = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in done.args]
        merge = merged(block, args, rules=done.rules, prove=False, exports=exports)
    now = {below: block.get_submodule(below) for below in done.layers}
    if merge is None or isinstance(merge, Refusal) or not _fits(merge, done, now):
        raise FusionError(
            f"With these weights, what was merged in `{done.path}` would be another layer; unfuse "
            "the model, load them, and fuse it again."
        )
    with torch.no_grad():
        for below, layer in merge.layers.items():
            for mine, new in zip(now[below].parameters(), layer.parameters(), strict=True):
                mine.copy_(new)
    done.written = _digests(block, done.layers)


@contextmanager
def _with(
    block: nn.Module, done: MergedBlock, modules: dict[str, nn.Module], tensors: dict[str, Tensor]
) -> Iterator[None]:
    """A context in which the block is what it was, of these modules and tensors."""
    class_ = type(block)
    now = {below: block.get_submodule(below) for below in modules}
    _exchange(block, class_of(done.base), modules, tensors)
    try:
        yield
    finally:
        _exchange(block, class_, now, dict.fromkeys(tensors))


def _fits(merge: Merge, done: MergedBlock, now: dict[str, nn.Module]) -> bool:
    return merge.source == done.source and all(
        [p.shape for p in layer.parameters()] == [p.shape for p in now[below].parameters()]
        for below, layer in merge.layers.items()
    )


def _exchange(
    block: nn.Module, class_: Any, modules: dict[str, nn.Module], tensors: dict[str, Any]
) -> None:
    for below, module in modules.items():
        put(block, (below,), module)
    _put_tensors(block, tensors)
    block.__class__ = class_


def _put_tensors(block: nn.Module, tensors: dict[str, Any]) -> None:
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        module = block.get_submodule(path)
        table: Any = module._parameters if name in module._parameters else module._buffers
        table[name] = tensor


def _empty(tensor: Tensor, device: torch.device) -> Tensor:
    made = torch.empty_like(tensor, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made


def _trains(block: nn.Module, layers: Sequence[str]) -> bool:
    return any(
        parameter.requires_grad
        for below in layers
        for parameter in block.get_submodule(below).parameters(recurse=False)
    )


def _digests(block: nn.Module, layers: Sequence[str]) -> dict[str, str]:
    """What tells whether the layers' tensors were changed, moved, or made another dtype."""
    return {
        f"{below}.{name}": _digest(parameter)
        for below in layers
        for name, parameter in block.get_submodule(below).named_parameters(recurse=False)
    }


def _digest(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "meta"
    values = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return f"{tensor.dtype} {tensor.device} {hashlib.sha256(values.tobytes()).hexdigest()}"
