"""The algebra of folding a batch norm into the weighted layer before it.

    y  = γ · (W x + b − μ) / sqrt(σ² + ε) + β
       = W' x + b'
    s  = γ / sqrt(σ² + ε)               [out]
    W' = W · s, along W's out channels
    b' = (b − μ) · s + β                [out]

s and b' are computed in float64 and rounded once. So is W' in half, bfloat16 and float64; float32
weights are multiplied in float32, by the rounded s: two roundings, at most one unit in the last
place, at half the time.
"""

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["ChannelAffine", "as_batch_norm", "fold_batch_norm", "fold_into_weight"]

# Weights folded at a time: a large layer is never whole in float64, and a block stays in the cache.
_BLOCK_ELEMENTS = 1 << 16
_MOST_DIMENSIONS = 5  # of what a batch norm takes: [N, C, D, H, W]


@dataclass(frozen=True)
class ChannelAffine:
    """What a batch norm in eval mode does to each channel: x ↦ x · scale + shift."""

    scale: Tensor  # [channels] float64
    shift: Tensor  # [channels] float64

    @classmethod
    def of_batch_norm(
        cls, mean: Tensor, var: Tensor, eps: float, gamma: Tensor | None, beta: Tensor | None
    ) -> "ChannelAffine":
        """Return the affine of a batch norm; `None` for γ or β means 1 or 0 (`affine=False`)."""
        scale = torch.rsqrt(var.detach().double() + eps)
        if gamma is not None:
            scale = scale * gamma.detach().double()
        shift = -mean.detach().double() * scale
        if beta is not None:
            shift = shift + beta.detach().double()
        return cls(scale, shift)


def fold_into_weight(
    weight: Tensor, bias: Tensor | None, affine: ChannelAffine, *, transposed_groups: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias that include `affine`, in the dtype of `weight`.

    `weight` is `[out, in/groups, *kernel]` (conv) or `[out, in]` (linear), or, with
    `transposed_groups` = groups ≥ 1, a transposed conv's `[in, out/groups, *kernel]`: there the
    out channels of group g belong to the g-th block of rows, so one scale vector per block.

    >>> import torch
    >>> affine = ChannelAffine(torch.tensor([2.0, 3.0]).double(), torch.tensor([0.0, 1.0]).double())
    >>> fold_into_weight(torch.ones(2, 1), None, affine)
    (tensor([[2.],
            [3.]]), tensor([0., 1.]))
    """
    folded = torch.empty_like(weight, requires_grad=False)  # keeps the layout (channels_last)
    scale = _scale_per_row(weight, affine.scale, transposed_groups)
    if weight.dtype is torch.float32:
        torch.mul(weight.detach(), scale.float(), out=folded)
        return folded, _folded_bias(bias, affine).float()
    rows = max(1, _BLOCK_ELEMENTS // max(1, weight[0].numel()))
    for block, wide, scales in zip(
        folded.split(rows), weight.detach().split(rows), scale.split(rows), strict=True
    ):
        block.copy_(wide.to(torch.float64, copy=True).mul_(scales))
    return folded, _folded_bias(bias, affine).to(weight.dtype)


def _folded_bias(bias: Tensor | None, affine: ChannelAffine) -> Tensor:
    return affine.shift if bias is None else bias.detach().double() * affine.scale + affine.shift


def _scale_per_row(weight: Tensor, scale: Tensor, transposed_groups: int) -> Tensor:
    """Return `[rows of weight, 1 or out/groups, 1, …]`, to multiply each row of `weight` with."""
    ones = [1] * (weight.dim() - 2)
    if not transposed_groups:
        return scale.reshape(-1, 1, *ones)
    per_group = scale.reshape(transposed_groups, -1, *ones)
    return per_group.repeat_interleave(weight.shape[0] // transposed_groups, 0)


def fold_batch_norm(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Return weight and bias of `layer` with the batch norm `norm` folded in; changes neither.

    `layer` is any of torch's convolutions, transposed convolutions or a linear layer.
    """
    norm = as_batch_norm(norm)
    affine = ChannelAffine.of_batch_norm(
        norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    groups = layer.groups if getattr(layer, "transposed", False) else 0
    with torch.inference_mode(False), torch.no_grad():
        return fold_into_weight(layer.weight, layer.bias, affine, transposed_groups=groups)


def as_batch_norm(norm: Any) -> Any:
    """Return `norm` with the tensors and settings of a batch norm; itself, if it is one.

    A module of a class of its own is asked, in float64, what it makes of 0 and of 1: its ε may be
    a number in its code.

        shift = f(0)        scale = f(1) − f(0)        [channels]
    """
    if isinstance(norm, _BatchNorm) or not isinstance(norm, nn.Module):
        return norm
    wide: Any = copy.deepcopy(norm).double()
    zero = torch.zeros_like(wide.running_mean)[None]
    with torch.inference_mode(False), torch.no_grad():
        while not _takes(wide, zero) and zero.dim() < _MOST_DIMENSIONS:
            zero = zero[..., None]
        shift, one = (wide(given).flatten() for given in (zero, zero + 1))
    return SimpleNamespace(
        running_mean=torch.zeros_like(shift),
        running_var=torch.ones_like(shift),
        weight=one - shift,
        bias=shift,
        eps=0.0,
    )


def _takes(norm: nn.Module, given: Tensor) -> bool:
    """Whether the norm's code is for as many dimensions; else it fails, or gives other sizes."""
    try:
        return bool(norm(given).shape == given.shape)
    except Exception:  # noqa: BLE001 - a check of its own, or torch's
        return False
