"""The algebra of folding a batch norm into the weighted layer before it.

    y  = γ · (W x + b − μ) / sqrt(σ² + ε) + β
       = W' x + b'
    s  = γ / sqrt(σ² + ε)               [out]
    W' = W · s, along W's out channels
    b' = (b − μ) · s + β                [out]

Computed in float64 and rounded once to the weight's dtype, so that half and bfloat16 layers lose
no more than that rounding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ChannelAffine", "fold_into_weight"]


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
    wide = weight.detach().double()
    if transposed_groups:
        blocks = wide.unflatten(0, (transposed_groups, -1))
        per_block = affine.scale.reshape(transposed_groups, 1, -1, *[1] * (weight.dim() - 2))
        scaled = (blocks * per_block).flatten(0, 1)
    else:
        scaled = wide * affine.scale.reshape(-1, *[1] * (weight.dim() - 1))
    shift = affine.shift if bias is None else bias.detach().double() * affine.scale + affine.shift
    folded = torch.empty_like(weight)  # keeps the weight's own layout (channels_last)
    folded.copy_(scaled)
    return folded, shift.to(weight.dtype)
