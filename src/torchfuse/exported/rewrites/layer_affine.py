"""layer → affine: a scale and a shift per channel are taken into the layer before them.

    s · (W ⊛ x + b) + t = (s · W) ⊛ x + (s · b + t)

Layer scale, learned scalars, norms of any spelling; the layer may pad, be grouped, transposed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchfuse.algebra import after
from torchfuse.exported.rewrites._rewrite import Edit, Rewrite, fits, layer_of

if TYPE_CHECKING:
    from torch.fx import Node

    from torchfuse.exported.reading import Reading

__all__ = ["REWRITE"]


def _find(reading: Reading, node: Node) -> list[Edit]:
    affine = reading.affine(node)
    layer = None if affine is None else reading.layer(affine.x)
    if affine is None or layer is None or not fits(affine, layer):
        return []
    return [
        Edit(
            (layer.node, node),
            lambda: layer_of(after(affine.affine, layer.exact), layer.x),
            named_after=layer.node,
        )
    ]


REWRITE = Rewrite(
    "layer_affine",
    "constant × ÷ + −, layer scale or a norm taken into the layer before it",
    "gamma * conv(x) → conv'(x)",
    _find,
)
