"""Runs a graph node by node over all samples at once, so that one pass sees every tensor whole.

A quantity over the data (a channel's mean, its largest value) is then known as soon as a node has
run, and can be used before the next one does. A tensor is freed after its last use: in memory are
the samples at the frontier, not the whole pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from torchfuse.checking import copy_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torchfuse.inputs import Case

__all__ = ["Step", "attribute", "set_attribute", "steps"]


class Step:
    """One node that has just run, and what it gave for each case."""

    def __init__(self, node: fx.Node, values: list[Any], call: Callable[[int], Any]) -> None:
        self.node = node
        self.values = values  # may be changed: the nodes after it read what is in here
        self._call = call

    def run_again(self) -> None:
        """Compute the node anew, after its parameters were changed."""
        self.values[:] = [self._call(i) for i in range(len(self.values))]


def steps(
    graph_module: fx.GraphModule, data: Sequence[Case]
) -> Iterator[tuple[Step, dict[fx.Node, list[Any]]]]:
    """Yield each node of an exported graph as it has run on every case, with all values alive."""
    last = {source: node for node in graph_module.graph.nodes for source in node.all_input_nodes}
    arguments = [_flat_arguments(graph_module, case) for case in data]
    values: dict[fx.Node, list[Any]] = {}
    placeholders = 0
    for node in graph_module.graph.nodes:
        if node.op == "output":
            return
        if node.op == "placeholder":
            made = [given[placeholders] for given in arguments]
            placeholders += 1
            values[node] = made
            yield Step(node, made, made.__getitem__), values
        elif node.op == "get_attr":
            values[node] = [attribute(graph_module, node.target)] * len(data)
        else:

            def call(sample: int, node: fx.Node = node) -> Any:
                return _called(graph_module, node, values, sample)

            values[node] = [call(i) for i in range(len(data))]
            yield Step(node, values[node], call), values
        for source in node.all_input_nodes:
            if last[source] is node:
                values.pop(source, None)


def _flat_arguments(graph_module: fx.GraphModule, case: Case) -> list[Any]:
    """The values of the graph's placeholders; an in-place operator may write to them."""
    names = [node.target for node in graph_module.graph.nodes if node.op == "placeholder"]
    given = copy_tensors((case.args, dict(case.kwargs)))
    leaves = pytree.tree_leaves(given)
    assert len(leaves) == len(names), (len(leaves), names)
    return leaves


def _called(
    graph_module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, list[Any]], sample: int
) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: values[source][sample])
    with torch.no_grad():  # here and not around the generator: it would hold for its caller too
        if node.op == "call_module":
            return graph_module.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def attribute(graph_module: fx.GraphModule, target: Any) -> Tensor:
    """The tensor that a get_attr node stands for."""
    value: Any = graph_module
    for name in str(target).split("."):
        value = getattr(value, name)
    assert isinstance(value, Tensor)
    return value.detach()


def set_attribute(graph_module: fx.GraphModule, target: Any, tensor: Tensor) -> None:
    """Write `tensor` into what a get_attr node stands for, in its dtype."""
    attribute(graph_module, target).copy_(tensor)
