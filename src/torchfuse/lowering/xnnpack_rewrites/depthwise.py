"""A depthwise 7×7 convolution as three that are exactly it.

XNNPACK's depthwise kernels have at most 25 taps; one with 49 runs as a grouped convolution, several
times slower. With padding p, stride and bias as they are:

    W, 7×7  =  the 5×5 core                              padding p − 1
            +  rows 0 and 6, 2×7, dilation (6, 1)        padding p
            +  columns 0 and 6 of the five rows between, 5×2, dilation (1, 6), padding (p − 1, p)

Each of the 49 weights is in exactly one of them, at its place.
"""

from typing import Any

import torch
from torch import fx

from torchfuse.lowering.xnnpack_rewrites.writing import Writer, constant, static_shape

__all__ = ["parts_of", "split_large_depthwise_kernels"]

_SIZE = 7


def parts_of(
    weight: torch.Tensor,
) -> tuple[tuple[torch.Tensor, tuple[int, int], tuple[int, int]], ...]:
    """Return the three kernels, each with its dilation and by how much less it is padded.

    `weight` is [channels, 1, 7, 7].
    """
    return (
        (weight[:, :, 1:6, 1:6], (1, 1), (1, 1)),
        (weight[:, :, [0, 6], :], (6, 1), (0, 0)),
        (weight[:, :, 1:6, [0, 6]], (1, 6), (1, 0)),
    )


def split_large_depthwise_kernels(program: torch.export.ExportedProgram) -> int:
    """Split each depthwise 7×7 convolution of constant weights, padded and not dilated."""
    count = 0
    for target in (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding):
        for node in program.graph.find_nodes(op="call_function", target=target):
            count += _split(program, node)
    return count


def _split(program: torch.export.ExportedProgram, node: fx.Node) -> int:
    defaults: tuple[Any, ...] = (None, None, None, [1, 1], [0, 0], [1, 1], 1)
    args = (*node.args, *defaults[len(node.args) :])
    source, weight, bias, stride, padding, dilation, groups = args
    shape = static_shape(weight)
    if shape is None or shape[1:] != [1, _SIZE, _SIZE] or groups != shape[0] or node.kwargs:
        return 0
    if padding == "same" and stride in ([1, 1], [1]):
        padding = [_SIZE // 2, _SIZE // 2]
    if isinstance(padding, str) or min(padding) < 1 or set(dilation) != {1}:
        return 0
    stride, padding = (value * (2 // len(value)) for value in (list(stride), list(padding)))
    name = program.graph_signature.inputs_to_parameters.get(weight.name)
    if name is None or len(weight.users) > 1:
        return 0
    aten = torch.ops.aten
    write = Writer(node)
    total = None
    for number, (values, apart, less) in enumerate(parts_of(program.state_dict[name])):
        kernel = constant(program, f"{weight.name}_part{number}", values)
        pads = [padding[0] - less[0], padding[1] - less[1]]
        part = write(
            aten.conv2d.default, source, kernel, bias if number == 0 else None, stride, pads,
            list(apart), groups,
        )  # fmt: skip
        total = part if total is None else write(aten.add.Tensor, total, part)
    assert total is not None
    write.replace_by(total)
    return 1
