"""What a call costs: multiply-adds, and bytes of activations read and written."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import SymInt, Tensor
from torch.fx.node import map_arg

from torchfuse.fusing.programs.memory import is_view

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.export import ExportedProgram

__all__ = ["Cost", "cost", "program_cost"]

aten = torch.ops.aten

_WEIGHTED_BY_OUTPUT = {
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
    aten.linear.default,
}
_WEIGHTED_BY_INPUT = {
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}
_POOLS = {aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default}
_REDUCTIONS = {
    *(aten.mean.dim, aten.sum.dim_IntList),
    *(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default),
    aten.adaptive_avg_pool3d.default,
}
_MOVES = {
    *(aten.cat.default, aten.stack.default, aten.clone.default, aten.contiguous.default),
    *(aten.constant_pad_nd.default, aten.pad.default),
}
# A size that was declared dynamic, and of which export knows no example
_UNKNOWN = 2


@dataclass(frozen=True)
class Cost:
    """Of one call or several."""

    macs: int
    traffic_bytes: int

    def __add__(self, other: Cost) -> Cost:
        """The cost of both."""
        return Cost(self.macs + other.macs, self.traffic_bytes + other.traffic_bytes)

    def __lt__(self, other: Cost) -> bool:
        """Whether one of the two is less, and neither more."""
        return self != other and (
            self.macs <= other.macs and self.traffic_bytes <= other.traffic_bytes
        )


def cost(target: Any, args: Sequence[Any], read: Sequence[Tensor], made: Any, views: bool) -> Cost:
    """Return what a call costs, given its arguments' and its result's (fake) values.

    `read` are the activations among the arguments; a view moves nothing.
    """
    if views or not isinstance(made, Tensor):
        return Cost(0, 0)
    moved = sum(_numel(tensor) * tensor.element_size() for tensor in (*read, made))
    return Cost(_macs(target, args, read, made), moved)


def program_cost(program: ExportedProgram) -> Cost:
    """Return what a whole program costs; what its tensors are is read and not computed."""
    signature = program.graph_signature
    stored = {
        *signature.inputs_to_parameters,
        *signature.inputs_to_buffers,
        *signature.inputs_to_lifted_tensor_constants,
    }
    total = Cost(0, 0)
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        read = [
            given.meta["val"]
            for given in node.all_input_nodes
            if isinstance(given.meta.get("val"), Tensor) and given.name not in stored
        ]
        args = map_arg(node.args, lambda given: given.meta.get("val"))
        made = node.meta.get("val")
        total += cost(node.target, args, read, made, views=is_view(node.target))
    return total


def _macs(target: Any, args: Sequence[Any], read: Sequence[Tensor], made: Tensor) -> int:
    if target in _WEIGHTED_BY_OUTPUT or target in _WEIGHTED_BY_INPUT:
        weight: Tensor = args[1]
        places = made if target in _WEIGHTED_BY_OUTPUT else args[0]
        return _numel(places) * prod(weight.shape[1:])
    if target in (aten.matmul.default, aten.mm.default, aten.addmm.default):
        return _numel(made) * _size(read[0].shape[-1]) if read else _numel(made)
    if target in _POOLS:
        kernel = args[1]
        return _numel(made) * prod(kernel if isinstance(kernel, (list, tuple)) else [kernel])
    if target in _REDUCTIONS:
        return sum(map(_numel, read))
    return 0 if target in _MOVES else _numel(made)


def _numel(tensor: Tensor) -> int:
    return prod(map(_size, tensor.shape))


def _size(size: int | SymInt) -> int:
    if isinstance(size, SymInt):
        hint = size.node.hint
        return _UNKNOWN if hint is None else int(hint)
    return size
