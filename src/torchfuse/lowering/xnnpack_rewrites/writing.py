"""Writing calls into the graph of an exported program."""

from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

__all__ = ["Writer", "constant", "static_shape"]


class Writer:
    """Writes calls before a node, each with the value that it has on the example's shapes."""

    def __init__(self, node: fx.Node) -> None:
        self._node = node

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        """Return the call of an operator on these arguments; it is of the node's own module."""
        with self._node.graph.inserting_before(self._node):
            made = self._node.graph.call_function(target, args)
        values = fx.map_arg(args, lambda given: given.meta["val"])
        made.meta = {**self._node.meta, "val": target(*values)}
        return made

    def replace_by(self, made: fx.Node) -> None:
        """Let whoever reads the node read `made`, and take the node out."""
        self._node.replace_all_uses_with(made)
        self._node.graph.erase_node(self._node)


def constant(program: torch.export.ExportedProgram, name: str, values: torch.Tensor) -> fx.Node:
    """Return a new parameter of the program, in its signature too."""
    graph, first = program.graph, next(iter(program.graph.nodes))
    # Of any other strides, also of a size of 1, ExecuTorch takes another order of dimensions.
    values = values.detach().clone(memory_format=torch.contiguous_format)
    with graph.inserting_before(first):
        made: fx.Node = graph.placeholder(name)
    made.meta["val"] = _fake_mode(graph).from_tensor(values, static_shapes=True)
    spec = InputSpec(InputKind.PARAMETER, TensorArgument(made.name), made.name)
    program.graph_signature.input_specs.insert(0, spec)
    program.state_dict[made.name] = nn.Parameter(values, requires_grad=False)
    return made


def _fake_mode(graph: fx.Graph) -> Any:
    values = (node.meta.get("val") for node in graph.nodes)
    return next(value.fake_mode for value in values if hasattr(value, "fake_mode"))


def static_shape(node: Any) -> list[int] | None:
    """Return the shape of a node's tensor; None: it is no tensor, or has dynamic sizes."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    shape = getattr(value, "shape", None)
    if shape is None or not all(isinstance(size, int) for size in shape):
        return None
    return list(shape)
