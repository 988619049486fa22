"""Upsampling to the nearest by a whole number: rows and columns repeated by concatenations.

XNNPACK takes no `upsample_nearest2d`. With channels last, [n·h, w, c]:

    columns   [n·h, w, c] twice beside each other     = [n·h, w, 2c]  = [n·h, 2w, c]
    rows      [n·h, 1, 2wc] twice below each other    = [n·h, 2, 2wc] = [n, 2h, 2w, c]
"""

from typing import Any

import torch
from torch import fx

from torchfuse.lowering.xnnpack_rewrites.writing import Writer, static_shape

__all__ = ["write_upsampling_as_concatenations"]

_IMAGE_DIMENSIONS = 4


def write_upsampling_as_concatenations(program: torch.export.ExportedProgram) -> int:
    """Write each upsampling of images to the nearest by whole numbers as two concatenations."""
    aten = torch.ops.aten
    count = 0
    for target in (aten.upsample_nearest2d.vec, aten._upsample_nearest_exact2d.vec):
        for node in program.graph.find_nodes(op="call_function", target=target):
            source = node.args[0]
            shape, made = static_shape(source), static_shape(node)
            if shape is None or made is None or len(shape) != _IMAGE_DIMENSIONS:
                continue
            n, c, h, w = shape
            down, right = made[2] // h, made[3] // w
            if made[2:] != [down * h, right * w]:
                continue
            write = Writer(node)
            x = write(aten.permute.default, source, [0, 2, 3, 1])
            x = _repeated(write, x, [n * h, w, c], right, 2)
            x = _repeated(write, x, [n * h, 1, right * w * c], down, 1)
            x = write(aten.reshape.default, x, [n, made[2], made[3], c])
            write.replace_by(write(aten.permute.default, x, [0, 3, 1, 2]))
            count += 1
    return count


def _repeated(write: Writer, x: fx.Node, shape: list[int], times: int, axis: int) -> Any:
    aten = torch.ops.aten
    # A node for each, since ExecuTorch counts one that is concatenated with itself as one.
    parts = [write(aten.reshape.default, x, shape) for _ in range(times)]
    return parts[0] if times == 1 else write(aten.cat.default, parts, axis)
