"""One slice of an axis, taken away: `x[:, i]` and `unbind` as a slice and a reshape.

XNNPACK takes both of these, and neither `select_copy` nor `squeeze_copy`.
"""

import operator
from typing import Any

import torch
from torch import fx

from torchfuse.lowering.xnnpack_rewrites.writing import Writer, static_shape

__all__ = ["write_selections_as_slices"]


def write_selections_as_slices(program: torch.export.ExportedProgram) -> int:
    """Write each `select` and each part of an `unbind` of a tensor of floats as a slice."""
    aten = torch.ops.aten
    count = 0
    for node in program.graph.find_nodes(op="call_function", target=aten.select.int):
        count += _written(node, *node.args)
    for node in program.graph.find_nodes(op="call_function", target=aten.unbind.int):
        source, axis = (*node.args, 0)[:2]
        for part in list(node.users):
            if part.target is operator.getitem:
                count += _written(part, source, axis, part.args[1])
    return count


def _written(node: fx.Node, source: Any, axis: Any, index: Any) -> int:
    aten = torch.ops.aten
    shape, made = static_shape(source), static_shape(node)
    if shape is None or made is None or not source.meta["val"].is_floating_point():
        return 0
    if not isinstance(index, int) or not isinstance(axis, int):
        return 0
    axis, index = axis % len(shape), index % shape[axis]
    write = Writer(node)
    part = write(aten.slice.Tensor, source, axis, index, index + 1)
    write.replace_by(write(aten.reshape.default, part, made))
    return 1
