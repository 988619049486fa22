"""Products of stacks of matrices as one `bmm`, [b·h, m, k] · [b·h, k, n].

Lowering writes a `matmul` of more than three dimensions with two `expand_copy` that expand nothing,
which XNNPACK does not take, so that they cut the program into pieces.
"""

import math

import torch

from torchfuse.lowering.xnnpack_rewrites.writing import Writer, static_shape

__all__ = ["write_matmul_as_bmm"]


def write_matmul_as_bmm(program: torch.export.ExportedProgram) -> int:
    """Write each matmul of two stacks of the same shape as a bmm."""
    aten = torch.ops.aten
    count = 0
    for node in program.graph.find_nodes(op="call_function", target=aten.matmul.default):
        left, right = node.args
        a, b = static_shape(left), static_shape(right)
        if a is None or b is None or len(a) < 3 or len(a) != len(b) or a[:-2] != b[:-2]:
            continue
        write = Writer(node)
        stack = math.prod(a[:-2])
        flat = [
            matrices
            if len(shape) == 3
            else write(aten.reshape.default, matrices, [stack, *shape[-2:]])
            for matrices, shape in ((left, a), (right, b))
        ]
        made = write(aten.bmm.default, *flat)
        if len(a) > 3:
            made = write(aten.reshape.default, made, [*a[:-1], b[-1]])
        write.replace_by(made)
        count += 1
    return count
