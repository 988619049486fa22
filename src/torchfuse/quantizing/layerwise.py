"""Runs a graph on all samples side by side, from one layer to the next.

A quantity over the data (a channel's mean, its largest value) is then known as soon as a layer has
run, and can be used before anything after it does. Between layers each sample runs by itself and
frees what is used up, so in memory is what is still to be read, not the whole pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from torchfuse.verifying.outputs import copy_tensors

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence

    from torchfuse.cases import Case

__all__ = ["Step", "attribute", "paired_steps", "set_attribute", "steps"]


class Step:
    """A layer that has just run on every case."""

    def __init__(self, node: fx.Node, runs: Sequence[_Run], weights: _Weights) -> None:
        self.node = node
        self._runs = runs
        self._weights = weights

    @property
    def outputs(self) -> list[Any]:
        """What the layer gave for each case."""
        return [run.value(self.node) for run in self._runs]

    @property
    def inputs(self) -> list[Any]:
        """What the layer's first argument was in each case."""
        source = self.node.args[0]
        assert isinstance(source, fx.Node)
        return [run.value(source) for run in self._runs]

    def called_on(self, inputs: Sequence[Any]) -> list[Any]:
        """Return what the layer makes of another first argument in each case."""
        return [run.called(self.node, x) for run, x in zip(self._runs, inputs, strict=True)]

    def run_again(self) -> None:
        """Compute the layer anew, after its parameters were changed."""
        self._weights.forget()
        for run in self._runs:
            run.compute(self.node)


def steps(
    graph_module: fx.GraphModule, data: Sequence[Case], layers: Container[Any]
) -> Iterator[Step]:
    """Yield each node that calls one of `layers`, in running order, as it has run on every case."""
    nodes = list(graph_module.graph.nodes)
    weights = _Weights(graph_module, layers)
    last = {source: node for node in nodes for source in node.all_input_nodes}
    runs = [_Run(graph_module, case, weights, last) for case in data]
    for node in nodes:
        if node.op == "call_function" and node.target in layers:
            for run in runs:
                run.up_to(node)
            yield Step(node, runs, weights)
            weights.forget()


def paired_steps(
    reference: fx.GraphModule,
    quantized: fx.GraphModule,
    data: Sequence[Case],
    layers: Container[Any],
) -> Iterator[tuple[Step, Step]]:
    """Yield each layer of a float graph beside the same one of the int8 graph made from it."""
    pairs = zip(steps(reference, data, layers), steps(quantized, data, layers), strict=True)
    for expected, step in pairs:
        assert expected.node.name == step.node.name, "both graphs have the same layers"
        yield expected, step


class _Run:
    """One case on its way through the graph."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        case: Case,
        weights: _Weights,
        last: dict[fx.Node, fx.Node],
    ) -> None:
        self._module = graph_module
        self._weights = weights
        self._last = last
        self._ahead = [n for n in graph_module.graph.nodes if n not in weights.nodes]
        self._ahead.reverse()
        self._used_up: list[fx.Node] = []
        placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        # Copied, since an in-place operator may write to them.
        leaves = pytree.tree_leaves(copy_tensors((case.args, dict(case.kwargs))))
        self._values: dict[fx.Node, Any] = dict(zip(placeholders, leaves, strict=True))

    def up_to(self, node: fx.Node) -> None:
        """Run everything until and with this node, whose inputs stay until it goes on."""
        while self._ahead:
            ahead = self._ahead.pop()
            for source in self._used_up:
                self._values.pop(source, None)
            self._used_up = [s for s in ahead.all_input_nodes if self._last[s] is ahead]
            if ahead.op != "placeholder":
                self.compute(ahead)
            if not ahead.users:
                self._used_up.append(ahead)
            if ahead is node:
                return

    def value(self, node: fx.Node) -> Any:
        """Return what a node gave, if it is still to be read."""
        return self._weights.value(node) if node in self._weights.nodes else self._values[node]

    def compute(self, node: fx.Node) -> None:
        """Run one node."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
        self._values[node] = _called(self._module, node, args, kwargs)

    def called(self, node: fx.Node, first: Any) -> Any:
        """Return what a node makes of another first argument."""
        args, kwargs = fx.node.map_arg((node.args[1:], node.kwargs), self.value)
        return _called(self._module, node, (first, *args), kwargs)


class _Weights:
    """Parameters, and int8 ones as the floats that a layer takes: the same for every case."""

    def __init__(self, graph_module: fx.GraphModule, layers: Container[Any]) -> None:
        self._module = graph_module
        self._floats: dict[fx.Node, Any] = {}
        # Nothing else that is computed from parameters: an operator might write to it in one case.
        self.nodes = {
            node
            for node in graph_module.graph.nodes
            if node.op == "get_attr"
            or (
                "dequantize" in str(node.target)
                and all(source.op == "get_attr" for source in node.all_input_nodes)
                and all(user.target in layers for user in node.users)
            )
        }

    def value(self, node: fx.Node) -> Any:
        """Return what one of `nodes` gives."""
        if node.op == "get_attr":
            return _looked_up(self._module, node.target)
        if node not in self._floats:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
            self._floats[node] = _called(self._module, node, args, kwargs)
        return self._floats[node]

    def forget(self) -> None:
        """Compute anew from now on: a parameter was changed, or others are needed next."""
        self._floats.clear()


def _called(graph_module: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any) -> Any:
    with torch.no_grad():  # here and not around the generator: it would hold for its caller too
        if node.op == "call_module":
            return graph_module.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _looked_up(graph_module: fx.GraphModule, target: Any) -> Any:
    value: Any = graph_module
    for name in str(target).split("."):
        value = getattr(value, name)
    return value.detach() if isinstance(value, Tensor) else value


def attribute(graph_module: fx.GraphModule, target: Any) -> Tensor:
    """The tensor that a get_attr node stands for."""
    value = _looked_up(graph_module, target)
    assert isinstance(value, Tensor)
    return value


def set_attribute(graph_module: fx.GraphModule, target: Any, tensor: Tensor) -> None:
    """Write `tensor` into what a get_attr node stands for, in its dtype."""
    attribute(graph_module, target).copy_(tensor)
