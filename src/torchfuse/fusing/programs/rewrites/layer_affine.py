"""layer → affine: a scale and a shift per channel are taken into the layer before them.

    s · (W ⊛ x + b) + t = (s · W) ⊛ x + (s · b + t)

Layer scale, learned scalars, norms of any spelling; the layer may pad, be grouped, transposed.
Transposes and reshapes that keep channels apart may lie between: heads of attention, tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchfuse.algebra import after
from torchfuse.fusing.programs.rewrites._carriers import Carrier, carrier, moves
from torchfuse.fusing.programs.rewrites._rewrite import Edit, NewCall, Rewrite, layer_of

if TYPE_CHECKING:
    from torch.fx import Node

    from torchfuse.fusing.programs.reading import Reading
    from torchfuse.planning import Refusal

__all__ = ["REWRITE"]


def _find(reading: Reading, node: Node) -> list[Edit]:
    affine = reading.affine(node)
    if affine is None:
        return []
    moved: list[Node] = []  # what lies between, the last one first
    x, axis = affine.x, affine.axis
    while moves(x) and not x.kwargs:
        found = carrier(x, axis) if axis is not None else Carrier(x.all_input_nodes[0], 0, 1)
        if found is None or found.repeats != 1:
            return []
        moved.append(x)
        x, axis = found.x, None if axis is None else found.axis
    layer = reading.layer(x)
    if layer is None or axis not in (None, layer.axis):
        return []

    def result() -> NewCall | Refusal:
        made = layer_of(after(affine.affine, layer.exact), layer.x)
        for call in reversed(moved):
            if isinstance(made, NewCall):
                made = NewCall(call.target, (made, *call.args[1:]))
        return made

    return [Edit((layer.node, *reversed(moved), node), result, named_after=layer.node)]


REWRITE = Rewrite(
    "layer_affine",
    "constant × ÷ + −, layer scale or a norm taken into the layer before it",
    "gamma * conv(x) → conv'(x)",
    _find,
)
