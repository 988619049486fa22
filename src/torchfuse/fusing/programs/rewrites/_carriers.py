"""Calls that move or average values channel by channel: an affine may change places with them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from torchfuse.fusing.programs.reading import arguments, each, same_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "AVERAGES",
    "Carrier",
    "average_arguments",
    "carrier",
    "is_average",
    "moves",
    "order_of_axes",
    "reshapes",
    "zeros_around",
]

aten = torch.ops.aten

_ADAPTIVE: dict[Any, int] = {
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
}
AVERAGES: dict[Any, int] = {
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
}
# Values stay in their order
_RESHAPES = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten.view_as.default, aten.reshape_as.default),
        *(aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default),
        *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    }
)
_PERMUTES = frozenset(
    {
        *(aten.permute.default, aten.transpose.int, aten.t.default, aten.mT.default),
        *(aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist),
        *(aten.swapaxes.default, aten.swapdims.default, aten.numpy_T.default),
    }
)


@dataclass(frozen=True)
class Carrier:
    """What a call was given, and where the channels were there."""

    x: Node
    axis: int
    repeats: int  # each channel of `x` is this many of the result's


def carrier(node: Node, axis: int) -> Carrier | None:
    """Return how `node` carries the channels that are its axis `axis`; None: not apart."""
    target: Any = node.target
    x = node.args[0] if node.args else None
    if node.op != "call_function" or not isinstance(x, Node):
        return None
    given, made = x.meta.get("val"), node.meta.get("val")
    if not isinstance(given, Tensor) or not isinstance(made, Tensor):
        return None
    order = order_of_axes(node)
    if order is not None:
        return Carrier(x, order[axis], 1)
    if target is aten.select.int:
        return Carrier(x, axis + (axis >= arguments(node)[1] % given.dim()), 1)
    if target is aten.slice.Tensor:
        return Carrier(x, axis, 1) if arguments(node)[1] % given.dim() != axis else None
    if target in _RESHAPES:
        return _reshaped(x, given.shape, made.shape, axis)
    if not is_average(node, axis):
        return None
    if target is aten.mean.dim and not arguments(node)[2]:
        gone = _axes(node, given.dim())
        return Carrier(x, [dim for dim in range(given.dim()) if dim not in gone][axis], 1)
    return Carrier(x, axis, 1)


def _reshaped(x: Node, given: Sequence[Any], made: Sequence[Any], axis: int) -> Carrier | None:
    """How a reshape carries channels: with all axes before theirs, or after, or flattened."""
    before = axis + 1
    if same_shape(given[:before], made[:before]):
        return Carrier(x, axis, 1)
    after = len(made) - axis
    if after <= len(given) and same_shape(given[len(given) - after :], made[axis:]):
        return Carrier(x, len(given) - after, 1)
    whole = same_shape(given[:1], made[:1]) and len(made) == 2 < len(given)
    if axis != 1 or not whole or not all(isinstance(size, int) for size in given[1:]):
        return None
    return Carrier(x, 1, prod(given[2:]))


def moves(node: Node) -> bool:
    """Whether `node` gives all values that it was given, once each, in another order or shape."""
    return reshapes(node) or node.target in _PERMUTES


def reshapes(node: Node) -> bool:
    """Whether `node` gives all values that it was given, in their order."""
    return node.target in _RESHAPES


def order_of_axes(node: Node) -> list[int] | None:
    """Which axis of what it was given each axis of a permutation is; None: it is something else."""
    if node.target not in _PERMUTES:
        return None
    assert callable(node.target)
    sizes = range(1, node.meta["val"].dim() + 1)
    permuted = node.target(torch.empty(*sizes, device="meta"), *node.args[1:], **node.kwargs)
    return [size - 1 for size in permuted.shape]


def is_average(node: Node, axis: int) -> bool:
    """Whether each value of `node` is a mean of values of one channel, of no padding.

    `axis` is that of the channels in the result.
    """
    x = node.args[0] if node.args else None
    target: Any = node.target
    if not isinstance(x, Node) or not isinstance(x.meta.get("val"), Tensor):
        return False
    rank: int = x.meta["val"].dim()
    if target is aten.mean.dim:
        gone = _axes(node, rank)
        _, _, keeps, dtype = arguments(node)
        return dtype is None and 0 < len(gone) < rank and not (keeps and axis in gone)
    if target in _ADAPTIVE:
        return axis < rank - _ADAPTIVE[target]
    if target in AVERAGES:
        _, _, padding, _, counts, divisor = average_arguments(node)
        return divisor is None and not (any(padding) and counts) and axis < rank - len(padding)
    return False


def zeros_around(node: Node, dims: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """How many zeros a padding puts before and after each of the last `dims` axes.

    None if it is something else: another value, less than nothing, also around other axes.
    """
    if node.target is aten.constant_pad_nd.default:
        _, sizes, value = arguments(node)
    elif node.target is aten.pad.default:
        _, sizes, mode, value = arguments(node)
        if mode != "constant":
            return None
    else:
        return None
    if value or not dims or not all(isinstance(size, int) and size >= 0 for size in sizes):
        return None
    given = [*sizes, *[0] * (2 * dims - len(sizes))]  # the last axis first
    if any(given[2 * dims :]):
        return None
    return tuple(given[0 : 2 * dims : 2][::-1]), tuple(given[1 : 2 * dims : 2][::-1])


def _axes(node: Node, rank: int) -> set[int]:
    """The axes that a mean is over; none: all."""
    dims = arguments(node)[1]
    return {dim % rank for dim in _list(dims)} if dims is not None else set(range(rank))


def average_arguments(
    node: Node,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool, bool, int | None]:
    """Kernel, stride, padding, ceil_mode, count_include_pad and divisor of an average pool."""
    dims = AVERAGES[node.target]
    _, kernel, stride, padding, ceil, counts, *divisor = arguments(node)
    sizes = each(kernel, dims)
    return (
        sizes,
        each(stride, dims) if stride else sizes,
        each(padding, dims),
        bool(ceil),
        bool(counts),
        divisor[0] if divisor else None,
    )


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
