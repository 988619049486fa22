"""layer → layer: one layer, where that takes fewer multiply-adds.

    W₂ ⊛ (W₁ ⊛ x + b₁) + b₂ = (W₂ W₁) ⊛ x + (W₂ b₁ + b₂)

Linear layers, a 1×1 convolution before or after a k×k one, any two whose second one does not pad.
Before a linear layer or a 1×1 convolution, reshapes that keep channels apart may lie between: rows
of tokens, the one place that is left of a map. They come after the one layer then. Transposes of
what two linear layers see come before it, so that the result lies in memory as it did.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from torchfuse.algebra import Layer, compose
from torchfuse.fusing.programs.reading import arguments
from torchfuse.fusing.programs.rewrites._carriers import carrier, moves, order_of_axes
from torchfuse.fusing.programs.rewrites._rewrite import Edit, NewCall, Rewrite, layer_of

if TYPE_CHECKING:
    from torch.fx import Node

    from torchfuse.fusing.programs.reading import Reading
    from torchfuse.planning import Refusal

__all__ = ["REWRITE"]

aten = torch.ops.aten

_SIZED = (aten.view.default, aten.reshape.default, aten.unflatten.int)
_SIZED_LIKE = (aten.view_as.default, aten.reshape_as.default)


def _find(reading: Reading, node: Node) -> list[Edit]:
    second = reading.layer(node)
    if second is None:
        return []
    moved: list[tuple[Node, int]] = []  # what lies between, the last one first; its channels' axis
    x, axis = second.x, second.axis
    while moves(x) and not x.kwargs and x.target not in _SIZED_LIKE:
        found = carrier(x, axis)
        if found is None or found.repeats != 1:
            return []
        moved.append((x, axis))
        x, axis = found.x, found.axis
    first = reading.layer(x)
    between = [call for call, _ in reversed(moved)]
    if first is None or axis != first.axis:
        return []
    if any(reading.only_reader(call) is None for call in (first.node, *between)):
        return []
    dims = len(first.layer.kernel)
    if not moved and dims != len(second.layer.kernel):
        return []
    if moved and not _is_pointwise(second.layer):
        return []
    linear = not dims and not second.layer.kernel
    transposed = linear and all(order_of_axes(call) is not None for call in between)

    def result() -> NewCall | Refusal:
        last = _pointwise(second.exact, dims) if moved else second.exact
        x: Any = first.x
        if transposed:
            for call in between:
                x = NewCall(call.target, (x, *call.args[1:]))
            return layer_of(compose(first.exact, last), x)
        made = layer_of(compose(first.exact, last), x)
        for call, its in reversed(moved):
            if isinstance(made, NewCall):
                rest = _with_channels(call, its, last.channels_out)
                made = NewCall(call.target, (made, *rest))
        return made

    return [Edit((first.node, *between, node), result, node, keeps_strides=bool(moved))]


def _is_pointwise(layer: Layer) -> bool:
    """Whether each place is given what the layer makes of that place alone."""
    return (
        not layer.transposed
        and not any(layer.padding)
        and all(size == 1 for size in (*layer.kernel, *layer.stride))
    )


def _pointwise(layer: Layer, dims: int) -> Layer:
    """Return a pointwise layer as one of so many spatial dimensions."""
    ones = (1,) * dims
    weight = layer.weight.reshape(*layer.weight.shape[:2], *ones)
    return replace(layer, weight=weight, stride=ones, padding=(0,) * dims, dilation=ones)


def _with_channels(call: Node, axis: int, channels: int) -> list[Any]:
    """The arguments of a move but the first one, for so many channels along `axis`."""
    rest: list[Any] = list(call.args[1:])
    if call.target not in _SIZED:
        return rest
    start = 0
    if call.target is aten.unflatten.int:
        start = arguments(call)[1] % call.all_input_nodes[0].meta["val"].dim()
    sizes: list[Any] = list(rest[-1])
    if start <= axis < start + len(sizes) and sizes[axis - start] != -1:
        sizes[axis - start] = channels
    return [*rest[:-1], sizes]


REWRITE = Rewrite(
    "layer_chain",
    "two layers in a row made one, where that takes fewer multiply-adds",
    "linear2(linear1(x)) → linear(x)",
    _find,
)
