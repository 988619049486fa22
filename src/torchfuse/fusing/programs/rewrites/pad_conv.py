"""zero padding → convolution: the convolution pads, where both sides are padded alike.

A convolution's own padding is the same on both sides. Where the padding before it is not, that of
the first side is right for the second one too if no window then comes or goes: with strides, what
is padded at the end is often out of reach. Otherwise the kernel would need zeros in it, which are
multiplied: that costs more than the copy which the padding is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.fx import Node

from torchfuse.algebra import padded
from torchfuse.fusing.programs.reading import same_shape
from torchfuse.fusing.programs.rewrites._carriers import zeros_around
from torchfuse.fusing.programs.rewrites._rewrite import Edit, NewCall, Rewrite, layer_of
from torchfuse.planning import Refusal

if TYPE_CHECKING:
    from torchfuse.fusing.programs.reading import LayerCall, Reading

__all__ = ["REWRITE"]


def _find(reading: Reading, node: Node) -> list[Edit]:
    layer = reading.layer(node)
    if layer is None or layer.layer.transposed:
        return []
    sides = zeros_around(layer.x, len(layer.layer.kernel))
    x = layer.x.args[0] if layer.x.args else None
    if sides is None or not isinstance(x, Node):
        return []
    begin, end = sides

    def result() -> NewCall | Refusal:
        made = padded(layer.exact, begin)
        if begin != end and not _reaches_as_far(layer, x, begin):
            unlike = next((a, b) for a, b in zip(begin, end, strict=True) if a != b)
            return Refusal(
                "What is padded before it is not the same on both sides ({} and {}), as a "
                "convolution's own padding is, and a larger kernel with zeros in it would take "
                "more multiply-adds.".format(*unlike)
            )
        return layer_of(made, x)

    return [Edit((layer.x, node), result, named_after=node)]


def _reaches_as_far(layer: LayerCall, x: Node, begin: tuple[int, ...]) -> bool:
    """Whether there are as many windows if both sides are padded as the first one is."""
    sizes = layer.layer
    dims = len(sizes.kernel)
    windows = [
        (size + 2 * (own + more) - dilation * (kernel - 1) - 1) // stride + 1
        for size, own, more, dilation, kernel, stride in zip(
            x.meta["val"].shape[-dims:],
            *(sizes.padding, begin, sizes.dilation, sizes.kernel, sizes.stride),
            strict=True,
        )
    ]
    return same_shape(windows, layer.node.meta["val"].shape[-dims:])


REWRITE = Rewrite(
    "pad_conv",
    "zero padding before a convolution taken into it",
    "conv(pad(x)) → conv'(x)",
    _find,
)
