"""concatenation of layers → affine: each layer takes in its own channels' part.

    bn(cat(conv₁(x), conv₂(y))) = cat(conv₁'(x), conv₂'(y))

Only where every part is a layer: DenseNet's parts are read by others too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from torchfuse.algebra import Affine, after
from torchfuse.fusing.programs.reading import arguments
from torchfuse.fusing.programs.rewrites._rewrite import Edit, NewCall, Rewrite, layer_of
from torchfuse.planning import Refusal

if TYPE_CHECKING:
    from torch.fx import Node

    from torchfuse.fusing.programs.reading import LayerCall, Reading

__all__ = ["REWRITE"]

aten = torch.ops.aten


def _find(reading: Reading, node: Node) -> list[Edit | Refusal]:
    affine = reading.affine(node)
    if affine is None or affine.x.target is not aten.cat.default:
        return []
    cat = affine.x
    parts, axis = arguments(cat)
    axis %= cat.meta["val"].dim()
    layers = [reading.layer(part) for part in parts]
    known = [layer for layer in layers if layer is not None and layer.axis == axis]
    if affine.axis not in (None, axis) or not known or len(set(parts)) < len(parts):
        return []
    if len(known) < len(parts):
        other = next(p for p, lay in zip(parts, layers, strict=True) if lay not in known)
        return [
            Refusal(
                f"Of what is concatenated before it, `{other}` does not come straight from a "
                "layer along the same axis."
            )
        ]
    order = reading.memory.position
    goes = (*sorted((lay.node for lay in known), key=order.__getitem__), cat, node)
    return [Edit(goes, lambda: _merged(known, affine.affine, axis), named_after=known[0].node)]


def _merged(layers: list[LayerCall], affine: Affine, axis: int) -> NewCall | Refusal:
    channels = [layer.layer.channels_out for layer in layers]
    parts = []
    scales = affine.scale.expand(sum(channels)).split(channels)
    shifts = affine.shift.expand(sum(channels)).split(channels)
    for layer, scale, shift in zip(layers, scales, shifts, strict=True):
        part = layer_of(after(Affine(scale, shift), layer.exact), layer.x)
        if isinstance(part, Refusal):
            return part
        parts.append(part)
    return NewCall(aten.cat.default, (parts, axis))


REWRITE = Rewrite(
    "cat_affine",
    "a norm over a concatenation of layers taken into each of them",
    "bn(cat([conv1(x), conv2(y)])) → cat([conv1'(x), conv2'(y)])",
    _find,
)
