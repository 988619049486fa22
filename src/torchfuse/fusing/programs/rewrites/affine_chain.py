"""affine → affine: one, where that takes fewer calls.

    s₂ · (s₁ · x + t₁) + t₂ = (s₂ s₁) · x + (s₂ t₁ + t₂)

A scale and a shift along axis 1 are one batch norm with mean 0 and variance 1: frozen batch norms
that are written as arithmetic become what they are, two batch norms in a row become one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchfuse.algebra import then
from torchfuse.fusing.programs.rewrites._rewrite import Edit, Rewrite, affine_of

if TYPE_CHECKING:
    from torch.fx import Node

    from torchfuse.fusing.programs.reading import Reading

__all__ = ["REWRITE"]


def _find(reading: Reading, node: Node) -> list[Edit]:
    second = reading.affine(node)
    first = None if second is None else reading.affine(second.x)
    if first is None or second is None:
        return []
    axes = {axis for axis in (first.axis, second.axis) if axis is not None}
    if len(axes) > 1 or reading.only_reader(first.node) is not node:
        return []
    reader = reading.only_reader(node)
    if reader is not None and reading.layer(reader) is not None:
        return []  # the layer takes in what it can: of two calls, before padding, more than of one
    axis = axes.pop() if axes else None
    rank = node.meta["val"].dim()
    return [
        Edit(
            (first.node, node),
            lambda: affine_of(then(first.affine, second.affine), axis, rank, first.x),
            named_after=node,
        )
    ]


REWRITE = Rewrite(
    "affine_chain",
    "scales and shifts in a row made one",
    "bn2(bn1(x)) → bn(x)",
    _find,
)
