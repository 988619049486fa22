"""Softmax of more dimensions than two: of rows, [rows, classes], with its axis moved last.

XNNPACK takes it over the last axis only, and ExecuTorch 1.5.1 hands it images in channels_last all
the same: over the width of a convolution's output it is computed over the channels.
"""

import math

import torch

from torchfuse.lowering.xnnpack_rewrites.writing import Writer, static_shape

__all__ = ["write_softmax_of_rows"]

_IMAGE_DIMENSIONS = 4


def write_softmax_of_rows(program: torch.export.ExportedProgram) -> int:
    """Write each softmax over another axis than the last, or of four dimensions, as one of rows."""
    aten = torch.ops.aten
    count = 0
    for node in program.graph.find_nodes(op="call_function", target=aten.softmax.int):
        source, axis = node.args[:2]
        shape = static_shape(source)
        if shape is None or len(node.args) > 2 or node.kwargs or len(shape) < 2:
            continue
        last = len(shape) - 1
        is_moved = axis % len(shape) != last
        if not is_moved and len(shape) != _IMAGE_DIMENSIONS:
            continue
        order = list(range(len(shape)))
        order[axis], order[last] = order[last], order[axis]  # which undoes itself
        write = Writer(node)
        moved = write(aten.permute.default, source, order) if is_moved else source
        sizes = [shape[each] for each in order]
        rows = write(aten.reshape.default, moved, [math.prod(sizes[:-1]), sizes[-1]])
        made = write(aten.reshape.default, write(aten.softmax.int, rows, -1), sizes)
        write.replace_by(write(aten.permute.default, made, order) if is_moved else made)
        count += 1
    return count
