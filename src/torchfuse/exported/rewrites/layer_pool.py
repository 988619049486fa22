"""pointwise layer → average: the average is taken first, of what the layer then sees less.

mean(W x + b) = W mean(x) + b     of means that count no padding
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchfuse.exported.rewrites._carriers import carrier, is_average
from torchfuse.exported.rewrites._rewrite import Edit, NewCall, Rewrite, layer_of

if TYPE_CHECKING:
    from torch.fx import Node

    from torchfuse.exported.reading import Reading

__all__ = ["REWRITE"]


def _find(reading: Reading, node: Node) -> list[Edit]:
    layer = reading.layer(node.args[0]) if node.args else None
    if layer is None or layer.layer.transposed or any(layer.layer.padding):
        return []
    if any(size != 1 for size in (*layer.layer.kernel, *layer.layer.stride)):
        return []
    # The average must have the channels where it had them, and the dimensions that the layer needs.
    given, made = layer.node.meta["val"].dim(), node.meta["val"].dim()
    axis = made - 1 - len(layer.layer.kernel)
    found = carrier(node, axis) if is_average(node, axis) else None
    if found is None or found.axis != layer.axis or (layer.layer.kernel and given != made):
        return []
    return [
        Edit(
            (layer.node, node),
            lambda: layer_of(layer.exact, NewCall(node.target, (layer.x, *node.args[1:]))),
            named_after=layer.node,
        )
    ]


REWRITE = Rewrite(
    "layer_pool",
    "a 1×1 convolution or linear layer moved behind an average pool",
    "avg_pool(conv1x1(x)) → conv1x1(avg_pool(x))",
    _find,
)
