"""Calls that move or average values channel by channel: an affine may change places with them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from torchfuse.exported.reading import arguments, each, same_shape

__all__ = ["AVERAGES", "Carrier", "average_arguments", "carrier", "is_average", "order_of_axes"]

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
_FLATTENS = {aten.flatten.using_ints, aten.view.default, aten.reshape.default}


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
    if target in (aten.permute.default, aten.transpose.int):
        return Carrier(x, order_of_axes(node)[axis], 1)
    if target in _FLATTENS:
        whole = same_shape(given.shape[:1], made.shape[:1]) and made.dim() == 2 < given.dim()
        if axis != 1 or not whole or not all(isinstance(size, int) for size in given.shape[1:]):
            return None
        return Carrier(x, 1, prod(given.shape[2:]))
    if not is_average(node, axis):
        return None
    if target is aten.mean.dim and not arguments(node)[2]:
        gone = _axes(node, given.dim())
        return Carrier(x, [dim for dim in range(given.dim()) if dim not in gone][axis], 1)
    return Carrier(x, axis, 1)


def order_of_axes(node: Node) -> list[int]:
    """Which axis of what it was given each axis of a transpose or permute is."""
    rank = node.meta["val"].dim()
    _, *dims = arguments(node)
    if node.target is aten.permute.default:
        return [axis % rank for axis in dims[0]]
    order = list(range(rank))
    a, b = (axis % rank for axis in dims)
    order[a], order[b] = order[b], order[a]
    return order


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
