"""Means of images: over height and width kept as sizes of 1, over channels as a convolution.

XNNPACK takes `mean` over the two last of four dimensions, where they are kept, and no other.
"""

import torch

from torchfuse.lowering.xnnpack_rewrites.writing import Writer, constant, static_shape

__all__ = ["keep_dimensions_of_means", "write_means_over_channels_as_convolutions"]


def keep_dimensions_of_means(program: torch.export.ExportedProgram) -> int:
    """Write each mean over the last two of four dimensions, not kept, as one that keeps them."""
    aten = torch.ops.aten
    count = 0
    for node in program.graph.find_nodes(op="call_function", target=aten.mean.dim):
        source, axes, keep = (*node.args, False)[:3]
        shape, made = static_shape(source), static_shape(node)
        if shape is None or made is None or len(shape) != 4 or keep or node.kwargs or not axes:
            continue
        if {axis % 4 for axis in axes} != {2, 3}:
            continue
        write = Writer(node)
        write.replace_by(
            write(aten.reshape.default, write(aten.mean.dim, source, [2, 3], True), made)
        )
        count += 1
    return count


def write_means_over_channels_as_convolutions(program: torch.export.ExportedProgram) -> int:
    """Write each mean over the channels of images, in float32, as a convolution of weights 1/c."""
    aten = torch.ops.aten
    count = 0
    for node in program.graph.find_nodes(op="call_function", target=aten.mean.dim):
        source, axes = node.args[:2]
        shape, made = static_shape(source), static_shape(node)
        if shape is None or made is None or len(shape) != 4 or node.kwargs or not axes:
            continue
        if {axis % 4 for axis in axes} != {1} or source.meta["val"].dtype != torch.float32:
            continue
        write = Writer(node)
        weights = torch.full([1, shape[1], 1, 1], 1 / shape[1])
        averaging = constant(program, f"{node.name}_channels", weights)
        average = write(aten.conv2d.default, source, averaging)
        write.replace_by(
            average if len(made) == len(shape) else write(aten.reshape.default, average, made)
        )
        count += 1
    return count
