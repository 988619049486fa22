"""Group norm of images, written out, with the sums over a group as a 1×1 convolution.

XNNPACK takes no group norm. With the mean over height and width and a matrix B that averages the
channels of each group, [channels, channels]:

    d = x − B·mean(x)
    y = d · (rsqrt(B·mean(d²) + ε) · γ) + β        ε is the bias of the convolution
"""

from typing import Any

import torch
from torch import fx

from torchfuse.lowering.xnnpack_rewrites.writing import Writer, constant, static_shape

__all__ = ["write_out_group_norms"]

_IMAGE_DIMENSIONS = 4


def write_out_group_norms(program: torch.export.ExportedProgram) -> int:
    """Write out each group norm of images, [n, c, h, w], in float32."""
    aten = torch.ops.aten
    count = 0
    for node in program.graph.find_nodes(op="call_function", target=aten.group_norm.default):
        defaults: tuple[Any, ...] = (None, 1, None, None, 1e-5)
        source, groups, weight, bias, eps = (*node.args, *defaults[len(node.args) :])[:5]
        shape = static_shape(source)
        if shape is None or len(shape) != _IMAGE_DIMENSIONS or node.kwargs:
            continue
        if source.meta["val"].dtype != torch.float32:  # in half, d² may be too large
            continue
        write = Writer(node)
        channels = shape[1]
        average = torch.block_diag(
            *[torch.full([channels // groups] * 2, groups / channels)] * groups
        )[..., None, None]

        def averaged(x: fx.Node, name: str, *bias: fx.Node) -> fx.Node:
            over_pixels = write(aten.mean.dim, x, [2, 3], True)  # noqa: B023  # called at once
            matrix = constant(program, name, average)  # noqa: B023
            return write(aten.conv2d.default, over_pixels, matrix, *bias)  # noqa: B023

        centred = write(aten.sub.Tensor, source, averaged(source, f"{node.name}_groups"))
        epsilon = constant(program, f"{node.name}_eps", torch.full([channels], eps))
        squares = write(aten.mul.Tensor, centred, centred)
        variance = averaged(squares, f"{node.name}_groups_again", epsilon)
        factor = write(aten.rsqrt.default, variance)
        if weight is not None:
            shaped = write(aten.reshape.default, weight, [1, channels, 1, 1])
            factor = write(aten.mul.Tensor, factor, shaped)
        made = write(aten.mul.Tensor, centred, factor)
        if bias is not None:
            shaped = write(aten.reshape.default, bias, [1, channels, 1, 1])
            made = write(aten.add.Tensor, made, shaped)
        write.replace_by(made)
        count += 1
    return count
