"""Two calls in a row of which the second undoes the first, or does it again.

transpose ∘ transpose, permute ∘ permute, reshape ∘ reshape = x
−(−x) = x     relu(relu(x)) = relu(x), relu(relu6(x)) = relu6(x)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._prims_common import is_contiguous_or_false
from torch.fx import Node

from torchfuse.fusing.programs.reading import same_shape
from torchfuse.fusing.programs.rewrites._carriers import moves, order_of_axes, reshapes
from torchfuse.fusing.programs.rewrites._rewrite import Edit, Rewrite

if TYPE_CHECKING:
    from torchfuse.fusing.programs.reading import Reading

__all__ = ["REWRITE"]

aten = torch.ops.aten

_COPIES = (aten.contiguous.default, aten.clone.default)
_AGAIN: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.relu_.default: "relu",
    aten.relu6.default: "relu6",
    aten.relu6_.default: "relu6",
    aten.abs.default: "abs",
    aten.sigmoid.default: "sigmoid",
}
# What follows → after which calls it changes nothing
_DOES_NOTHING_TO = {
    "relu": ("relu", "relu6", "abs", "sigmoid"),
    "relu6": ("relu6", "sigmoid"),
    "abs": ("abs", "relu", "relu6", "sigmoid"),
}


def _find(reading: Reading, node: Node) -> list[Edit]:
    inner = node.args[0] if node.args else None
    if not isinstance(inner, Node) or inner.op != "call_function" or not inner.args:
        return []
    if moves(node):
        moved = _undone(reading, node)
        return [] if moved is None else [Edit((node,), lambda: moved)]
    x = inner.args[0]
    if node.target is aten.neg.default is inner.target and isinstance(x, Node):
        return [Edit((node,), lambda: x)]
    if _AGAIN.get(inner.target, "") in _DOES_NOTHING_TO.get(_AGAIN.get(node.target, ""), ()):
        return [Edit((node,), lambda: inner)]
    return []


def _undone(reading: Reading, node: Node) -> Node | None:
    """What `node` moves back to where it was."""
    x: Any = node.args[0]
    order = order_of_axes(node)
    may_copy = order is None
    between: list[Node] = []
    while isinstance(x, Node) and x.op == "call_function" and x.args:
        between.append(x)
        if x.target in _COPIES:
            x, may_copy = x.args[0], True
        elif order is None and reshapes(x):
            x = x.args[0]
        elif order is not None and (first := order_of_axes(x)) is not None:
            x = x.args[0]
            order = [first[axis] for axis in order]
        else:
            return None
        shaped = isinstance(x, Node) and same_shape(x.meta["val"].shape, node.meta["val"].shape)
        if shaped and (order is None or order == sorted(order)):
            if may_copy and not is_contiguous_or_false(x.meta["val"]):
                return None  # what views the copy later could not view this
            alone = not may_copy or _is_read_by_it_alone(reading, x, between, node)
            return x if alone else None
    return None


def _is_read_by_it_alone(reading: Reading, x: Node, between: list[Node], node: Node) -> bool:
    """Whether nobody tells whether `node` is a copy of `x`: of what is changed in place, a view."""
    memory = reading.memory
    if not memory.is_written(x) and not memory.is_written(node):
        return True
    ours = {*between, *memory.sharing(node)}
    for root in memory.roots[x]:
        for reader in memory.readers[root]:
            given = {other for other in reader.all_input_nodes if root in memory.roots[other]}
            is_later = memory.position[reader] > memory.position[x]
            if is_later and reader not in ours and not given <= ours:
                return False
        if root.op != "call_function":
            return False
    return True


REWRITE = Rewrite(
    "cancelling",
    "transposes and reshapes that cancel, double negation and a relu of a relu removed",
    "permute(permute(x)) → x",
    _find,
    makes_room=True,
)
