"""Expanding to the shape that is there already: a copy that XNNPACK does not take."""

import torch

from torchfuse.targets.executorch.rewrites.writing import static_shape

__all__ = ["remove_no_op_expands"]


def remove_no_op_expands(program: torch.export.ExportedProgram) -> int:
    """Remove each `expand` that changes nothing."""
    count = 0
    expands = program.graph.find_nodes(op="call_function", target=torch.ops.aten.expand.default)
    for node in expands:
        source = node.args[0]
        shape = static_shape(source)
        if shape is not None and shape == static_shape(node):
            node.replace_all_uses_with(source)
            program.graph.erase_node(node)
            count += 1
    return count
