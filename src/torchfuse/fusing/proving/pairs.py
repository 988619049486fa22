"""One fold by itself: a layer with its batch norm beside the folded layer, on the same input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchfuse.algebra.folding import as_batch_norm

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PairDifference", "decided", "normed", "unwrapped", "worse"]

# A fold may be this much less exact than the original, measured against float64.
_WORSE = 4.0


@dataclass(frozen=True)
class PairDifference:
    """How far a folded layer is from the layer and the batch norm."""

    max_rel: float
    problem: str | None  # None: within rounding


def worse(a: PairDifference | None, b: PairDifference) -> PairDifference:
    """The worse of two."""
    if a is None or (not a.problem and (b.problem or b.max_rel > a.max_rel)):
        return b
    return a


def decided(
    expected: Tensor,
    fused: Tensor,
    within: float,
    in_float64: Callable[[], tuple[Tensor, Tensor]],
) -> PairDifference:
    """How far what a folded layer gives is from what was `expected`.

    Up to `within` (relative) it is rounding. Beyond that, rounding hides small errors, and
    `in_float64` repeats both: there a right fold agrees to the last digits, and the error of either
    side can be measured.
    """
    difference, peak = _apart(expected, fused), _peak(expected)
    max_rel = difference / peak if peak else difference
    if not math.isfinite(max_rel):
        return PairDifference(max_rel, "its output is NaN or Inf, so nothing can be shown.")
    if max_rel <= within:
        return PairDifference(max_rel, None)
    exact, wide = in_float64()
    peak = _peak(exact)
    if not _apart(exact, wide) <= 1e-9 * peak:  # nor NaN
        return PairDifference(max_rel, f"the folded layer is off by {max_rel:.2g} (relative).")
    before, after = _apart(exact, expected), _apart(exact, fused)
    if not after <= _WORSE * before + _WORSE * torch.finfo(expected.dtype).eps * peak:
        return PairDifference(
            max_rel,
            f"in {expected.dtype} the folded layer is off by {after:.2g}, the original by "
            f"{before:.2g}.",
        )
    return PairDifference(max_rel, None)


def normed(layer: nn.Module, norm: nn.Module, output: Tensor) -> Tensor:
    """The batch norm, by torch's own function, over the layer's channel axis."""
    assert isinstance(layer.weight, Tensor)
    axis = output.dim() - 1 - (layer.weight.dim() - 2)
    moved = output.movedim(axis, 1) if output.dim() > 1 else output[None]
    alike = as_batch_norm(norm)
    mean, var, gamma, beta = alike.running_mean, alike.running_var, alike.weight, alike.bias
    if alike is not norm:  # in float64, whatever it was
        mean, var, gamma, beta = (t.to(output.dtype) for t in (mean, var, gamma, beta))
    result = F.batch_norm(moved, mean, var, gamma, beta, eps=alike.eps)
    return result.movedim(1, axis) if output.dim() > 1 else result[0]


def _apart(a: Tensor, b: Tensor) -> float:
    """max|a − b|."""
    if a.dtype == b.dtype and a.dtype in (torch.float32, torch.float64):
        return _peak(a - b)  # rounded once, in its last digit
    return _peak(a.double() - b.double())


def _peak(a: Tensor) -> float:
    """max|a|, NaN if one is; without a copy of it, as activations are large."""
    a = unwrapped(a)
    if not a.numel():
        return 0.0
    low, high = a.aminmax()
    return max(high.item(), -low.item())  # (of two zeros the first, which is not −0)


def unwrapped(tensor: Tensor) -> Tensor:
    """`tensor` as values, where torch.vmap or torch.func put it into a tensor of its own kind.

    Those of all samples, that is: inside torch.vmap a tensor seems to be that of one of them.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
