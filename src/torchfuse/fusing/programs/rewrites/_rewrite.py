"""What a rewrite is: a match in a program's graph, and what stands in its place.

A rewrite looks for its pattern at one node, and says which calls would go. Everything else is asked
by the engine: whether what goes is read by others, is written to, keeps its size and dtype, whether
it costs less. Only then the new calls are made, by the algebra.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from torchfuse.planning import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from torchfuse.algebra import Affine, Layer
    from torchfuse.fusing.programs.reading import Reading

__all__ = ["Constant", "Edit", "NewCall", "Rewrite", "affine_of", "layer_of"]

aten = torch.ops.aten

_CONV = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_CONV_TRANSPOSE = {
    1: aten.conv_transpose1d.default,
    2: aten.conv_transpose2d.input,
    3: aten.conv_transpose3d.input,
}


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor to store, in float64; it is rounded to the dtype of what it is computed with."""

    value: Tensor
    role: str  # the last part of its name: "weight"


@dataclass(frozen=True, eq=False)
class NewCall:
    """A call that comes: its arguments are nodes, other new calls, constants, numbers, lists."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Edit:
    """Calls that would go, and how to make what stands for the value of the last of them."""

    goes: tuple[Node, ...]
    result: Callable[[], NewCall | Node | Refusal]
    # The call after whose weight the new one is named
    named_after: Node | None = None
    # What reads the result, at whatever distance, must find it in memory as it was: a result that
    # is transposed where the old one was not breaks a view of what an activation makes of it.
    keeps_strides: bool = False


@dataclass(frozen=True)
class Rewrite:
    """One rule of `fuse_exported`."""

    name: str
    summary: str  # one line, for the documentation
    example: str  # what becomes what, for the documentation
    # The edits that the pattern at this node allows, the best one first.
    find: Callable[[Reading, Node], Sequence[Edit | Refusal]]
    # Kept although nothing is saved: it makes room for others.
    makes_room: bool = False


def layer_of(layer: Layer | Refusal, x: Any) -> NewCall | Refusal:
    """Return the call of a layer on `x`."""
    if isinstance(layer, Refusal):
        return layer
    weight = Constant(layer.weight, "weight")
    bias = None if layer.bias is None else Constant(layer.bias, "bias")
    dims = len(layer.kernel)
    if not dims:
        return NewCall(aten.linear.default, (x, weight, bias))
    sizes = [list(layer.stride), list(layer.padding)]
    dilation = list(layer.dilation)
    if layer.transposed:
        rest = (*sizes, list(layer.output_padding), layer.groups, dilation)
        return NewCall(_CONV_TRANSPOSE[dims], (x, weight, bias, *rest))
    return NewCall(_CONV[dims], (x, weight, bias, *sizes, dilation, layer.groups))


def affine_of(affine: Affine, axis: int | None, rank: int, x: Any) -> NewCall | Node:
    """Return the cheapest call or calls of an affine of `x`, of `rank` dimensions."""
    channels = max(affine.scale.numel(), affine.shift.numel())
    scales, shifts = bool((affine.scale != 1).any()), affine.shifts
    if scales and shifts and axis == 1:  # one call does both
        zeros, ones = torch.zeros(channels).double(), torch.ones(channels).double()
        values = {
            "weight": affine.scale.expand(channels).clone(),
            "bias": affine.shift.expand(channels).clone(),
            "running_mean": zeros,
            "running_var": ones,
        }
        constants = [Constant(value, role) for role, value in values.items()]
        return NewCall(aten.batch_norm.default, (x, *constants, False, 0.0, 0.0, False))
    made = x
    for needed, target, value in (
        (scales, aten.mul.Tensor, affine.scale),
        (shifts, aten.add.Tensor, affine.shift),
    ):
        if needed:
            sizes = [-1] if axis is None else [-1, *[1] * (rank - 1 - axis)]
            role = "scale" if target is aten.mul.Tensor else "shift"
            made = NewCall(target, (made, Constant(value.reshape(sizes).clone(), role)))
    assert isinstance(made, (NewCall, Node))
    return made
