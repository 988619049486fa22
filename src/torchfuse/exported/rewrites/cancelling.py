"""Two calls in a row of which the second undoes the first, or does it again.

transpose ∘ transpose, permute ∘ permute = x     −(−x) = x     relu(relu(x)) = relu(x)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from torchfuse.exported.rewrites._carriers import order_of_axes
from torchfuse.exported.rewrites._rewrite import Edit, Rewrite

if TYPE_CHECKING:
    from torchfuse.exported.reading import Reading

__all__ = ["REWRITE"]

aten = torch.ops.aten

_MOVES = (aten.permute.default, aten.transpose.int)
_AGAIN: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.relu_.default: "relu",
    aten.relu6.default: "relu6",
    aten.relu6_.default: "relu6",
    aten.abs.default: "abs",
}


def _find(_: Reading, node: Node) -> list[Edit]:
    inner = node.args[0] if node.args else None
    if not isinstance(inner, Node) or inner.op != "call_function" or not inner.args:
        return []
    x = inner.args[0]
    if node.target in _MOVES and inner.target in _MOVES and isinstance(x, Node):
        first, second = order_of_axes(inner), order_of_axes(node)
        if [first[axis] for axis in second] == list(range(len(first))):
            return [Edit((node,), lambda: x)]
    if node.target is aten.neg.default is inner.target and isinstance(x, Node):
        return [Edit((node,), lambda: x)]
    if node.target in _AGAIN and _AGAIN[node.target] == _AGAIN.get(inner.target):
        return [Edit((node,), lambda: inner)]
    return []


REWRITE = Rewrite(
    "cancelling",
    "transposes that cancel, double negation and a relu of a relu removed",
    "permute(permute(x)) → x",
    _find,
    makes_room=True,
)
