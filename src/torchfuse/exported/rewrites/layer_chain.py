"""layer → layer, with nothing between: one layer, where that takes fewer multiply-adds.

    W₂ ⊛ (W₁ ⊛ x + b₁) + b₂ = (W₂ W₁) ⊛ x + (W₂ b₁ + b₂)

Linear layers, a 1×1 convolution before or after a k×k one, any two whose second one does not pad.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchfuse.algebra import compose
from torchfuse.exported.rewrites._rewrite import Edit, Rewrite, layer_of

if TYPE_CHECKING:
    from torch.fx import Node

    from torchfuse.exported.reading import Reading

__all__ = ["REWRITE"]


def _find(reading: Reading, node: Node) -> list[Edit]:
    second = reading.layer(node)
    first = None if second is None else reading.layer(second.x)
    if first is None or second is None or reading.only_reader(first.node) is not node:
        return []
    if len(first.layer.kernel) != len(second.layer.kernel):
        return []
    return [
        Edit(
            (first.node, node),
            lambda: layer_of(compose(first.exact, second.exact), first.x),
            named_after=node,
        )
    ]


REWRITE = Rewrite(
    "layer_chain",
    "two layers in a row made one, where that takes fewer multiply-adds",
    "linear2(linear1(x)) → linear(x)",
    _find,
)
