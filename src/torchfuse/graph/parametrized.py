"""Weights that are computed from other parameters: parametrizations, and the older weight hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "computed_weight",
    "is_state_dict_hook_of_torch",
    "is_weight_hook",
    "unparametrized",
]


def unparametrized(layer: nn.Module) -> bool:
    """Whether the layer's weight and bias are plain parameters."""
    return not parametrize.is_parametrized(layer) and not any(
        map(is_weight_hook, layer._forward_pre_hooks.values())
    )


def is_weight_hook(hook: object) -> bool:
    """Whether a pre-hook is that of `torch.nn.utils.weight_norm` or `spectral_norm`."""
    return type(hook).__module__ in (
        "torch.nn.utils.weight_norm",
        "torch.nn.utils.spectral_norm",
    )


def is_state_dict_hook_of_torch(hook: object) -> bool:
    """Whether a state_dict hook belongs to a weight norm or a parametrization of torch."""
    inner = getattr(hook, "hook", hook)  # torch wraps some hooks
    inner = getattr(inner, "__func__", inner)
    name = getattr(inner, "__module__", None) or type(inner).__module__
    return str(name).startswith("torch.nn.utils.")


def computed_weight(layer: nn.Module) -> Tensor:
    """The weight that the layer's next call in eval mode uses."""
    for hook in layer._forward_pre_hooks.values():
        if type(hook).__module__ == "torch.nn.utils.weight_norm":
            return hook.compute_weight(layer)  # type: ignore[attr-defined,no-any-return]
        if type(hook).__module__ == "torch.nn.utils.spectral_norm":
            return hook.compute_weight(layer, do_power_iteration=False)  # type: ignore[attr-defined,no-any-return]
    assert isinstance(layer.weight, Tensor)
    return layer.weight
