"""Checkpoints of the unfused model in a fused one: where each key went, and loading them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchfuse.algebra.folding import fold_batch_norm
from torchfuse.cases import check_model
from torchfuse.errors import FusionError, InputError, first_line
from torchfuse.fusing.blocks.replacing import blocks_loaded
from torchfuse.fusing.module_edits import fusions_of, plain_layer, was_fused
from torchfuse.isolation.model_copy import shell

if TYPE_CHECKING:
    from torchfuse.fusing.module_edits import Folded, Fusions

__all__ = ["key_map", "load_unfused_state_dict"]


def load_unfused_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Loads a checkpoint of the unfused model into a fused one, folding what was fused.

    All keys of the unfused model must be there and no others; nothing is changed otherwise. Kept
    originals become the checkpoint's, so that `unfuse` gives it back.

    Raises:
        FusionError: the model was not fused by `fuse`.
        InputError: keys that lack or that are too many, or a tensor of another shape.
    """
    check_model(model)
    if not was_fused(model):
        raise FusionError(
            f"This {type(model).__name__} was not fused by torchfuse.fuse; use its own "
            "load_state_dict."
        )
    if not isinstance(state_dict, Mapping):
        raise InputError(
            f"Expected a state_dict, from key to tensor, got {type(state_dict).__name__}."
        )
    with blocks_loaded(model):
        _load_unfused(model, state_dict)


def _load_unfused(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    folded = [entry for done in fusions_of(model) for entry in done.folded]
    own = model.state_dict()
    kept = set(own)
    expected: set[str] = set()
    seen: set[str] = set()  # a layer that took in a second batch norm was plain by then
    for entry in folded:
        for paths, shape in ((entry.first, entry.layer), (entry.second, entry.norm)):
            for path in paths:
                left = model.get_submodule(path).state_dict()
                if paths is entry.second:
                    left = _own(left)  # its children, such as an activation, are as they were
                kept -= set(_below(path, left))
                if path not in seen:
                    expected |= set(_below(path, shape.state_dict()))
        seen |= set(entry.first)
    _check_keys(expected | kept, set(state_dict))
    rest = {key: value for key, value in state_dict.items() if key in kept}
    for key, value in rest.items():
        if isinstance(own[key], Tensor):
            _check_shape(key, value, own[key])
    known = dict(state_dict)
    # All are folded before the first is written: a checkpoint that does not fit changes nothing.
    loaded = [_loaded(model, entry, known) for entry in folded]
    model.load_state_dict(rest, strict=False)
    with torch.no_grad():
        for entry, (layer, norm, weight, bias) in zip(folded, loaded, strict=True):
            target = model.get_submodule(entry.first[0])
            target.weight.copy_(weight)  # type: ignore[operator]
            target.bias.copy_(bias)  # type: ignore[operator]
            if entry.original_layer is not None:
                assert entry.original_norm is not None
                shell(*entry.original_layer).load_state_dict(layer.state_dict())
                entry.original_norm.load_state_dict(_own(norm.state_dict()), strict=False)


def _check_keys(expected: set[str], given: set[str]) -> None:
    missing = sorted(key for key in expected - given if not key.endswith("num_batches_tracked"))
    unexpected = sorted(given - expected)
    if missing or unexpected:
        raise InputError(
            "Expected the state_dict of the unfused model; "
            + "; ".join(
                f"{word} {', '.join(keys[:5])}{' …' if len(keys) > 5 else ''}"
                for word, keys in (("missing:", missing), ("not in it:", unexpected))
                if keys
            )
            + ". A fused checkpoint loads with the model's own load_state_dict."
        )


def _check_shape(key: str, value: Any, own: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise InputError(f"Expected a tensor for {key}, got {type(value).__name__}.")
    if value.shape != own.shape:
        raise InputError(
            f"{key} has the shape {list(value.shape)}, expected {list(own.shape)}: this is a "
            "checkpoint of another model."
        )


def _own(state: Mapping[str, Any]) -> dict[str, Any]:
    """Of a state_dict, what is the module's own and not its children's."""
    return {name: value for name, value in state.items() if "." not in name}


def _below(path: str, names: Any) -> list[str]:
    return [f"{path}.{name}" if path else name for name in names]


def _loaded(
    model: nn.Module, entry: Folded, known: dict[str, Any]
) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """The layer and the norm with the checkpoint's values, and the weights folded from them.

    Those are added to `known`, for a second batch norm of the same layer.
    """
    device: Any = model.get_submodule(entry.first[0]).weight.device
    modules = []
    for paths, shape in ((entry.first, entry.layer), (entry.second, entry.norm)):
        module = copy.deepcopy(shape).to_empty(device=device)
        state = {}
        for name, shape_of in module.state_dict().items():
            (key,) = _below(paths[0], [name])
            if key in known:
                if isinstance(shape_of, Tensor):
                    _check_shape(key, known[key], shape_of)
                state[name] = known[key]
        try:
            module.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise InputError(
                f"The checkpoint does not fit `{paths[0]}` ({first_line(error)}); it is of another "
                "model."
            ) from error
        modules.append(module)
    layer, norm = modules
    weight, bias = fold_batch_norm(plain_layer(layer), norm)
    for path in entry.first:
        known |= {f"{path}.weight": weight, f"{path}.bias": bias}
    return layer, norm, weight, bias


def key_map(old_keys: list[str], done: Fusions) -> dict[str, str | None]:
    """Old key → the new key that its value went into; None if it is gone."""
    new: dict[str, str | None] = {key: key for key in old_keys}
    # β and μ went into the bias, γ and σ² into both; the weight is named for those.
    into = {"bias": "bias", "running_mean": "bias", "num_batches_tracked": None}
    for folded in done.folded:
        for path in folded.first:
            for name in folded.layer.state_dict():
                new[f"{path}.{name}"] = f"{path}.{'bias' if 'bias' in name else 'weight'}"
        for path in folded.second:
            for name in _own(folded.norm.state_dict()):
                last = into.get(name, "weight")
                new[f"{path}.{name}"] = f"{folded.first[0]}.{last}" if last else None
    for block in done.blocks:
        for key, target in new.items():
            if target is not None and target.startswith(f"{block.path}."):
                below = block.key_map.get(target[len(block.path) + 1 :])
                new[key] = None if below is None else f"{block.path}.{below}"
    return {key: new[key] for key in old_keys}
