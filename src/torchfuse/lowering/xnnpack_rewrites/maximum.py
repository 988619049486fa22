"""The maximum over height and width as a max-pooling as large as the image.

XNNPACK takes no `amax`; ExecuTorch cannot lower `adaptive_max_pool2d` at all.
"""

import operator
from typing import Any

import torch
from torch import fx

from torchfuse.lowering.xnnpack_rewrites.writing import Writer, static_shape

__all__ = ["write_maxima_as_poolings"]

_IMAGE_DIMENSIONS = 4


def write_maxima_as_poolings(program: torch.export.ExportedProgram) -> int:
    """Write each `amax` over the last two of four dimensions, and each adaptive max-pooling.

    Of these, such as divide the image evenly, and of which nobody reads the indices.
    """
    aten = torch.ops.aten
    count = 0
    for node in program.graph.find_nodes(op="call_function", target=aten.amax.default):
        source, axes = (*node.args, [])[:2]
        shape, made = _image(source), static_shape(node)
        if shape is None or made is None or node.kwargs or {axis % 4 for axis in axes} != {2, 3}:
            continue
        _pooled(node, source, shape[2:], made)
        count += 1
    for node in program.graph.find_nodes(
        op="call_function", target=aten.adaptive_max_pool2d.default
    ):
        source, size = node.args
        shape = _image(source)
        values = [user for user in node.users if user.users]
        if shape is None or any(v.target is not operator.getitem or v.args[1] for v in values):
            continue
        if shape[2] % size[0] or shape[3] % size[1]:
            continue
        for value in values:
            _pooled(value, source, [shape[2] // size[0], shape[3] // size[1]], None)
        for unread in list(node.users):
            program.graph.erase_node(unread)
        program.graph.erase_node(node)
        count += 1
    return count


def _image(node: Any) -> list[int] | None:
    shape = static_shape(node)
    if shape is None or len(shape) != _IMAGE_DIMENSIONS:
        return None
    return shape if node.meta["val"].is_floating_point() else None


def _pooled(node: fx.Node, source: Any, kernel: list[int], shape: list[int] | None) -> None:
    aten = torch.ops.aten
    write = Writer(node)
    made = write(aten.max_pool2d.default, source, kernel, kernel)
    write.replace_by(made if shape is None else write(aten.reshape.default, made, shape))
