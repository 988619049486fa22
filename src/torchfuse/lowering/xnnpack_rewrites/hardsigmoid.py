"""Hardsigmoid, clamp(x + 3, 0, 6)/6, with its numbers as constants.

Lowering turns each of its whole numbers into a float by a cast of its own, which XNNPACK does not
take.
"""

import torch

from torchfuse.lowering.xnnpack_rewrites.writing import Writer, constant, static_shape

__all__ = ["write_out_hardsigmoids"]


def write_out_hardsigmoids(program: torch.export.ExportedProgram) -> int:
    """Write out each hardsigmoid of a size that is known."""
    aten = torch.ops.aten
    count = 0
    for target in (aten.hardsigmoid.default, aten.hardsigmoid_.default):
        for node in program.graph.find_nodes(op="call_function", target=target):
            shape = static_shape(node)
            if shape is None:
                continue
            write = Writer(node)
            dtype, ones = node.meta["val"].dtype, [1] * len(shape)
            three = constant(program, f"{node.name}_three", torch.full(ones, 3.0, dtype=dtype))
            sixth = constant(program, f"{node.name}_sixth", torch.full(ones, 1 / 6, dtype=dtype))
            clamped = write(
                aten.hardtanh.default, write(aten.add.Tensor, node.args[0], three), 0.0, 6.0
            )
            write.replace_by(write(aten.mul.Tensor, clamped, sixth))
            count += 1
    return count
