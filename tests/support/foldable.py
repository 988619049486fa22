"""How many batch norms of a model can be folded, by another road: `torch.export`'s ATen graph.

A batch norm counts if its input was produced by a convolution or linear, used by it alone, with
weights nobody else uses, whose output channels are the batch norm's channels; operators that change
no value may lie between, none of their outputs used elsewhere.
"""

import copy
import warnings
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.fx import Node

aten = torch.ops.aten

_BATCH_NORMS = {aten.batch_norm.default}
_LINEARS = {aten.linear.default}
_CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.convolution.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}
_SAME_SHAPE = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.dropout.default,
    aten.feature_dropout.default,
}
_RESHAPES = {
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten._unsafe_view.default,
}
_SHAPE_OF_SECOND = {aten.reshape_as.default, aten.view_as.default, aten.expand_as.default}


@dataclass(frozen=True)
class Count:
    """Batch norms called in one pass, and how many of them can be folded."""

    batch_norms: int
    foldable: int


def count(model: nn.Module, *args: torch.Tensor) -> Count:
    """Return the count for one pass of `model`, in eval mode, over `args`."""
    return count_in(exported(model, args))


def exported(model: nn.Module, args: tuple[Any, ...]) -> torch.export.ExportedProgram:
    """Return the program of a copy of `model`."""
    with warnings.catch_warnings():
        # nn.LSTM keeps its weights in a list too, LeViT caches its attention biases: on a copy
        warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)
        return torch.export.export(copy.deepcopy(model), args, strict=False)


def count_in(program: torch.export.ExportedProgram) -> Count:
    """Return the count for an exported program."""
    graph = program.graph
    called = [node for node in graph.nodes if node.target in _BATCH_NORMS]
    return Count(len(called), sum(map(_can_be_folded, called)))


def _can_be_folded(batch_norm: Node) -> bool:
    _, scale, _, mean, _, training, *_ = batch_norm.args
    if training or mean is None or any(len(p.users) > 1 for p in (scale, mean) if p is not None):
        return False
    node, axis = batch_norm.args[0], 1
    while _readers(node) == 1:
        if node.target in _CONVOLUTIONS | _LINEARS:
            outputs = node.meta["val"].ndim - 1 if node.target in _LINEARS else 1
            return axis == outputs and len(node.args[1].users) == 1
        if node.op != "call_function" or node.args[0].__class__ is not Node:
            return False
        before = _axis_before(node, axis)
        if before is None:
            return False
        node, axis = node.args[0], before
    return False


def _readers(node: Node) -> int:
    """Return how many nodes read the values of `node`, not only its shape."""
    return sum(user.target not in _SHAPE_OF_SECOND or node is user.args[0] for user in node.users)


def _axis_before(node: Node, axis: int) -> int | None:
    """Return which axis of the node's input is `axis` of its output; None: no single one."""
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
    if node.target in _SAME_SHAPE:
        return axis if node.target is not aten.dropout.default or not node.args[2] else None
    if node.target in (aten.transpose.int, aten.permute.default):
        order = list(range(len(before)))
        if node.target is aten.permute.default:
            order = [dim % len(order) for dim in node.args[1]]
        else:
            first, second = node.args[1], node.args[2]
            order[first], order[second] = order[second], order[first]
        return order[axis]
    if node.target in _RESHAPES:
        for candidate, size in enumerate(before):
            same_inside = prod(before[candidate + 1 :]) == prod(after[axis + 1 :])
            if size == after[axis] and same_inside:
                return candidate
    return None
