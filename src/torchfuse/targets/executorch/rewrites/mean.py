"""The mean over height and width: kept as sizes of 1, and these reshaped away.

XNNPACK takes `mean` over the two last of four dimensions only where they are kept.
"""

import torch

from torchfuse.targets.executorch.rewrites.writing import Writer, static_shape

__all__ = ["keep_dimensions_of_means"]


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
