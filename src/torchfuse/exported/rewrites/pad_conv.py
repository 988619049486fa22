"""zero padding → convolution: the convolution pads, where both sides are padded alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchfuse.algebra import padded
from torchfuse.exported.reading import arguments
from torchfuse.exported.rewrites._rewrite import Edit, Rewrite, layer_of

if TYPE_CHECKING:
    from torch.fx import Node

    from torchfuse.exported.reading import Reading
    from torchfuse.planning import Refusal

__all__ = ["REWRITE"]

aten = torch.ops.aten


def _find(reading: Reading, node: Node) -> list[Edit | Refusal]:
    layer = reading.layer(node)
    pad = None if layer is None else layer.x
    if layer is None or pad is None or layer.layer.transposed:
        return []
    padding = _zeros(pad)
    dims = len(layer.layer.kernel)
    if padding is None or not dims:
        return []
    sides = [(padding[i], padding[i + 1]) for i in range(0, len(padding), 2)]  # last axis first
    sides += [(0, 0)] * (dims - len(sides))
    if any(a != b or not isinstance(a, int) or a < 0 for a, b in sides) or any(
        a for a, _ in sides[dims:]
    ):
        return []
    more = tuple(a for a, _ in reversed(sides[:dims]))
    x = pad.args[0]
    return [
        Edit(
            (pad, node),
            lambda: layer_of(padded(layer.exact, more), x),
            named_after=node,
        )
    ]


def _zeros(node: Node) -> list[Any] | None:
    """The sizes that a node pads with zeros; None if it is something else."""
    if node.target is aten.constant_pad_nd.default:
        _, sizes, value = arguments(node)
    elif node.target is aten.pad.default:
        _, sizes, mode, value = arguments(node)
        if mode != "constant":
            return None
    else:
        return None
    return None if value else list(sizes)


REWRITE = Rewrite(
    "pad_conv",
    "zero padding before a convolution taken into it",
    "conv(pad(x)) → conv'(x)",
    _find,
)
