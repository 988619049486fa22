"""pointwise layer → average: the average is taken first, of what the layer then sees less.

mean(W x + b) = W mean(x) + b     of means that count no padding
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchfuse.algebra import Layer
from torchfuse.fusing.programs.rewrites._carriers import carrier, is_average
from torchfuse.fusing.programs.rewrites._rewrite import Edit, NewCall, Rewrite, layer_of

if TYPE_CHECKING:
    from torch.fx import Node

    from torchfuse.fusing.programs.reading import Reading
    from torchfuse.planning import Refusal

__all__ = ["REWRITE"]


def _find(reading: Reading, node: Node) -> list[Edit]:
    layer = reading.layer(node.args[0]) if node.args else None
    if layer is None or layer.layer.transposed or any(layer.layer.padding):
        return []
    if any(size != 1 for size in (*layer.layer.kernel, *layer.layer.stride)):
        return []
    # The average must have the channels where it had them, and the dimensions that the layer needs;
    # where it leaves none but the channels' to the right, a convolution is a linear layer.
    dims, gone = len(layer.layer.kernel), layer.node.meta["val"].dim() - node.meta["val"].dim()
    is_flat = gone == dims and layer.layer.groups == 1
    axis = node.meta["val"].dim() - 1 - (0 if is_flat else dims)
    found = carrier(node, axis) if is_average(node, axis) else None
    if found is None or found.axis != layer.axis or (gone and dims and not is_flat):
        return []

    def result() -> NewCall | Refusal:
        exact = layer.exact
        if is_flat and dims:
            exact = Layer(exact.weight.flatten(1), exact.bias)
        return layer_of(exact, NewCall(node.target, (layer.x, *node.args[1:])))

    return [Edit((layer.node, node), result, named_after=layer.node)]


REWRITE = Rewrite(
    "layer_pool",
    "a 1×1 convolution or linear layer moved behind an average pool",
    "avg_pool(conv1x1(x)) → conv1x1(avg_pool(x))",
    _find,
)
