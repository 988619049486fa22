"""Which nodes of a program's graph share memory, and where it is written.

By the operators' schemas, as `torch.export` leaves them: in-place operators and views are nodes
like others there.
"""

from __future__ import annotations

from collections import defaultdict
from operator import getitem
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.fx import Graph

__all__ = ["Memory", "is_view"]

# They may return what they are given, and their schemas do not say so.
_PASSES_ON = frozenset(
    {
        *("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "type_as"),
        *("broadcast_tensors", "rrelu", "einsum", "meshgrid", "atleast_1d", "atleast_2d"),
        *("atleast_3d", "float_power"),
    }
)


class Memory:
    """Where each node's values lie: the nodes that made that memory, and who writes to it."""

    def __init__(self, graph: Graph) -> None:
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        self.roots: dict[Node, frozenset[Node]] = {}
        self.writes: dict[Node, list[Node]] = defaultdict(list)  # by root, in running order
        self.readers: dict[Node, list[Node]] = defaultdict(list)  # likewise, through any view
        for node in graph.nodes:
            shared, written = _shared_and_written(node)
            self.roots[node] = frozenset(
                {root for other in shared for root in self.roots[other]} or {node}
            )
            for other in written:
                for root in self.roots[other]:
                    self.writes[root].append(node)
            for other in node.all_input_nodes:
                for root in self.roots[other]:
                    self.readers[root].append(node)

    def sharing(self, node: Node) -> set[Node]:
        """Return the node and its views, and theirs."""
        found = {node}
        pending = [node]
        while pending:
            roots = self.roots[pending[-1]]
            for user in pending.pop().users:
                if user not in found and self.roots.get(user, frozenset()) & roots:
                    found.add(user)
                    pending.append(user)
        return found

    def is_written(self, node: Node) -> bool:
        """Whether anything in the program writes to where this node's values lie."""
        return any(self.writes.get(root) for root in self.roots[node])


def is_view(target: Any) -> bool:
    """Whether an operator moves nothing: it returns memory that it was given."""
    if target is getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    schema = target._schema
    return schema.name.removeprefix("aten::") in _PASSES_ON or any(
        argument.alias_info is not None for argument in schema.arguments
    )


def _shared_and_written(node: Node) -> tuple[list[Node], list[Node]]:
    """The arguments whose memory a call may return, and those that it may write to."""
    if node.op == "call_function" and node.target is getitem:
        return list(node.all_input_nodes), []
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        # A submodule of a control-flow operator or a context may do anything.
        inputs = list(node.all_input_nodes) if node.op.startswith("call") else []
        return inputs, inputs if isinstance(node.target, torch._ops.HigherOrderOperator) else []
    schema = node.target._schema
    if schema.name.removeprefix("aten::") in _PASSES_ON:
        return list(node.all_input_nodes), []
    returned = {
        name for entry in schema.returns if entry.alias_info for name in entry.alias_info.before_set
    }
    names = [argument.name for argument in schema.arguments]
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    shared: list[Node] = []
    written: list[Node] = []
    for argument in schema.arguments:
        if argument.alias_info is not None:
            nodes = list(_nodes(given.get(argument.name)))
            if argument.alias_info.is_write:
                written += nodes
            if returned & set(argument.alias_info.before_set):
                shared += nodes
    return shared, written


def _nodes(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _nodes(entry)
