"""affine → layer: a scale and a shift per channel are taken into the layer after them.

    W ⊛ (s · x + t) + b = (W · s) ⊛ x + (b + Σ W · t)

Also through what keeps channels apart: average pools, means, flattening, transposes. A shift is not
exact before zero padding, which it does not shift; of several calls, the scales are taken in there
and one shift stays: s · x + t = s · (x + t/s).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchfuse.algebra import Affine, before, then
from torchfuse.fusing.programs.rewrites._carriers import carrier
from torchfuse.fusing.programs.rewrites._rewrite import Edit, NewCall, Rewrite, affine_of, layer_of
from torchfuse.planning import Refusal

if TYPE_CHECKING:
    from torch.fx import Node

    from torchfuse.fusing.programs.reading import AffineCall, LayerCall, Reading

__all__ = ["REWRITE"]


def _find(reading: Reading, node: Node) -> list[Edit | Refusal]:
    layer = reading.layer(node)
    if layer is None:
        return []
    moved: list[Node] = []  # what lies between, the last one first
    repeats, axis, x = 1, layer.axis, layer.x
    while (found := carrier(x, axis)) is not None:
        moved.append(x)
        x, axis, repeated = found.x, found.axis, found.repeats
        repeats *= repeated
    calls: list[AffineCall] = []
    while (call := reading.affine(x)) is not None and call.axis in (None, axis):
        calls.append(call)
        x = call.x
    if not calls:
        return []
    goes = (*(call.node for call in reversed(calls)), *reversed(moved), node)

    def result() -> NewCall | Node | Refusal:
        affine = calls[-1].affine
        for call in reversed(calls[:-1]):
            affine = then(affine, call.affine)
        return _merged(layer, affine, repeats, moved, calls, x, axis)

    return [Edit(goes, result, named_after=node)]


def _merged(
    layer: LayerCall,
    affine: Affine,
    repeats: int,
    moved: list[Node],
    calls: list[AffineCall],
    x: Any,
    axis: int,
) -> NewCall | Node | Refusal:
    # Flattening repeats each channel; one value for all of them stays one.
    wide = Affine(
        *(
            values if values.numel() == 1 else values.repeat_interleave(repeats)
            for values in (affine.scale, affine.shift)
        )
    )
    merged = before(layer.exact, wide)
    only_scale = len(calls) > 1 and affine.shifts and bool((affine.scale != 0).all())
    if isinstance(merged, Refusal) and only_scale and bool((affine.scale != 1).any()):
        merged = before(layer.exact, Affine(wide.scale, torch.zeros(1).double()))
        shift = Affine(torch.ones(1).double(), affine.shift / affine.scale)
        x = affine_of(shift, axis, calls[-1].node.meta["val"].dim(), x)
    if isinstance(merged, Refusal):
        return merged
    for call in reversed(moved):
        x = NewCall(call.target, (x, *call.args[1:]))
    return layer_of(merged, x)


REWRITE = Rewrite(
    "affine_layer",
    "constant × ÷ + −, input mean and std, or a norm taken into the layer after it",
    "conv((x - mean) / std) → conv'(x)",
    _find,
)
