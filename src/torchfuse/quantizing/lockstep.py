"""Runs a graph on all samples side by side, from one layer to the next.

A quantity over the data (a channel's mean, its largest value) is then known as soon as a layer has
run, and can be used before anything after it does. Between layers each sample runs by itself and
frees what is used up, so in memory are the inputs and outputs of one layer, not the whole pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from torchfuse.checking import copy_tensors

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence

    from torchfuse.inputs import Case

__all__ = ["Step", "attribute", "set_attribute", "steps"]


class Step:
    """A layer that has just run on every case."""

    def __init__(self, node: fx.Node, runs: Sequence[_Run], constants: _Constants) -> None:
        self.node = node
        self._runs = runs
        self._constants = constants

    @property
    def outputs(self) -> list[Any]:
        """What the layer gave for each case."""
        return [run.values[self.node] for run in self._runs]

    @property
    def inputs(self) -> list[Any]:
        """What the layer's first argument was in each case."""
        source = self.node.args[0]
        assert isinstance(source, fx.Node)
        return [run.values[source] for run in self._runs]

    def constant(self, argument: Any) -> Any:
        """An argument of a node that is a constant, or computed from constants only."""
        return fx.node.map_arg(argument, self._constants.value)

    def run_again(self) -> None:
        """Compute the layer anew, after its parameters were changed."""
        self._constants.forget()
        for run in self._runs:
            run.compute(self.node)


def steps(
    graph_module: fx.GraphModule, data: Sequence[Case], layers: Container[Any]
) -> Iterator[Step]:
    """Yield each node that calls one of `layers`, in running order, as it has run on every case."""
    constants = _Constants(graph_module)
    last = {source: node for node in graph_module.graph.nodes for source in node.all_input_nodes}
    runs = [_Run(graph_module, case, constants, last) for case in data]
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.target in layers:
            for run in runs:
                run.up_to(node)
            yield Step(node, runs, constants)
            constants.forget()


class _Run:
    """One case on its way through the graph."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        case: Case,
        constants: _Constants,
        last: dict[fx.Node, fx.Node],
    ) -> None:
        self._module = graph_module
        self._constants = constants
        self._last = last
        self._ahead = [node for node in graph_module.graph.nodes if node not in constants.nodes]
        self._ahead.reverse()
        self._used_up: list[fx.Node] = []
        placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        # Copied, since an in-place operator may write to them.
        leaves = pytree.tree_leaves(copy_tensors((case.args, dict(case.kwargs))))
        self.values: dict[fx.Node, Any] = dict(zip(placeholders, leaves, strict=True))

    def up_to(self, node: fx.Node) -> None:
        """Run everything until and with this node, whose inputs stay until it goes on."""
        while self._ahead:
            ahead = self._ahead.pop()
            for source in self._used_up:
                self.values.pop(source, None)
            self._used_up = [s for s in ahead.all_input_nodes if self._last[s] is ahead]
            if ahead.op != "placeholder":
                self.compute(ahead)
            if not ahead.users:
                self._used_up.append(ahead)
            if ahead is node:
                return

    def compute(self, node: fx.Node) -> None:
        """Run one node."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
        self.values[node] = _called(self._module, node, args, kwargs)

    def _value(self, node: fx.Node) -> Any:
        return self.values[node] if node in self.values else self._constants.value(node)


class _Constants:
    """What is the same for every case, computed once for all that need it."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._module = graph_module
        self.nodes = _constant_nodes(graph_module)
        self._values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """Return what a constant node gives."""
        if node.op == "get_attr":
            return _looked_up(self._module, node.target)
        if node not in self._values:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
            self._values[node] = _called(self._module, node, args, kwargs)
        return self._values[node]

    def forget(self) -> None:
        """Compute anew from now on: parameters were changed, or others are needed next."""
        self._values.clear()


def _constant_nodes(graph_module: fx.GraphModule) -> set[fx.Node]:
    """Parameters, and what is computed from them only and written to by nobody."""
    nodes = list(graph_module.graph.nodes)
    parameters = {node for node in nodes if node.op == "get_attr"}

    def computed_from(sources: set[fx.Node]) -> set[fx.Node]:
        found = set(sources)
        for node in nodes:
            given = node.all_input_nodes
            if node.op == "call_function" and given and found.issuperset(given):
                found.add(node)
        return found

    constant = computed_from(parameters)
    changing = {source for node in nodes for source in _written_to(node)} & constant
    for node in reversed(nodes):
        if node in changing:  # and so may be what it is a view of
            changing.update(node.all_input_nodes)
    return computed_from(parameters - changing) | parameters


def _written_to(node: fx.Node) -> list[fx.Node]:
    schema = getattr(node.target, "_schema", None)
    given = zip(() if schema is None else schema.arguments, node.args, strict=False)
    return [
        argument
        for declared, argument in given
        if isinstance(argument, fx.Node)
        and declared.alias_info is not None
        and declared.alias_info.is_write
    ]


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
