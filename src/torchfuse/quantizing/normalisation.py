"""The normalisation of pixels, folded into the convolution that reads them.

    conv(W, (x·a + t) padded with 0)
    = conv([W·a/ā, Σ_c W_c·(t_c + a_c·m) / k], [(x − m)·ā, k] padded with 0)

The mean cannot go into the bias where the convolution pads: its border would be that of black
pixels. So it goes into the weights of one more channel, which is k inside the picture and 0 in the
padding. m is a whole number near the mean, so that what the weights are rounded by does not meet
a mean, and ā one factor for all channels: then int8 has a step for every pixel, and holds each as
it is. The kernels read channels by fours, so the fourth costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from torchfuse.quantizing.layerwise import attribute, set_attribute

__all__ = ["FLOAT", "RANGE", "fold_normalisation"]

aten = torch.ops.aten

FLOAT = "torchfuse_float"  # in a node's meta: it is to stay in float
RANGE = "torchfuse_range"  # in a node's meta: the range that int8 has to hold
_LARGEST_PIXEL = 255
_MOVING = (aten.permute.default, aten.contiguous.default, aten.clone.default)


def fold_normalisation(graph_module: fx.GraphModule) -> bool:
    """Fold what `WithPreprocessing` does to pixels into the convolutions that read them, in place.

    Return whether that was possible; if not, its two operators are marked to stay in float.
    """
    factor, term = (_reader(graph_module, name) for name in ("factor", "term"))
    if factor is None or term is None:
        return False
    moved, readers = _followed(term)
    if not readers or not all(_can_take(graph_module, node) for node in readers):
        factor.meta[FLOAT] = term.meta[FLOAT] = True
        return False
    scale, shift = (
        attribute(graph_module, n.args[1].target).double()  # type: ignore[union-attr]
        for n in (factor, term)
    )
    middle = int((-shift / scale).mean().round().clamp(0, _LARGEST_PIXEL))
    unit = float(scale.mean())
    low, high = -middle * unit, (_LARGEST_PIXEL - middle) * unit
    constant = high or -low
    of_constant = (shift + scale * middle) / constant
    for number, node in enumerate(readers):
        _fold_into(graph_module, node, scale / unit, of_constant, f"_pixel_weight_{number}")
    graph = graph_module.graph
    set_attribute(graph_module, factor.args[1].target, torch.full_like(scale, unit))  # type: ignore[union-attr]
    set_attribute(graph_module, term.args[1].target, torch.full_like(shift, low))  # type: ignore[union-attr]
    with graph.inserting_after(term):
        padded = graph.call_function(aten.constant_pad_nd.default, (term, [0, 1], constant))
    factor.meta[FLOAT] = term.meta[FLOAT] = True
    padded.meta = {**term.meta, "val": _with_one_more(term.meta["val"], -1)}
    del padded.meta[FLOAT]
    for node in (*moved, *readers):
        node.replace_input_with(term, padded)
    for node in moved:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node.meta["val"] = node.target(source.meta["val"], *node.args[1:], **node.kwargs)  # type: ignore[operator]
    for node in (padded, *moved):
        node.meta[RANGE] = (low, high)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return True


def _reader(graph_module: fx.GraphModule, name: str) -> fx.Node | None:
    """The operator that reads a buffer of `WithPreprocessing`."""
    for node in graph_module.graph.find_nodes(op="get_attr", target=name):
        users: list[fx.Node] = list(node.users)
        if len(users) == 1:
            return users[0]
    return None


def _followed(start: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """What only moves the tensor, in order, and what reads it then."""
    moved: list[fx.Node] = []
    readers: list[fx.Node] = []
    ahead = [start]
    while ahead:
        for user in ahead.pop(0).users:
            if user.target in _MOVING:
                moved.append(user)
                ahead.append(user)
            else:
                readers.append(user)
    return moved, readers


def _can_take(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.target is not aten.conv2d.default or (len(node.args) > 6 and node.args[6] != 1):
        return False
    weight = node.args[1]
    return (
        isinstance(weight, fx.Node)
        and weight.op == "get_attr"
        and attribute(graph_module, weight.target).shape[1] == 3
    )


def _fold_into(
    graph_module: fx.GraphModule, node: fx.Node, scale: Tensor, of_constant: Tensor, name: str
) -> None:
    source = node.args[1]
    assert isinstance(source, fx.Node)
    weight = attribute(graph_module, source.target)
    double = weight.double()
    fourth = (double * of_constant.reshape(1, -1, 1, 1)).sum(1, keepdim=True)
    folded = torch.cat([double * scale.reshape(1, -1, 1, 1), fourth], 1).to(weight.dtype)
    graph_module.register_parameter(name, nn.Parameter(folded, requires_grad=False))
    with graph_module.graph.inserting_before(source):
        replacement = graph_module.graph.get_attr(name)
    replacement.meta = {**source.meta, "val": _with_one_more(source.meta["val"], 1)}
    node.args = (node.args[0], replacement, *node.args[2:])


def _with_one_more(value: Tensor, dim: int) -> Tensor:
    return torch.cat([value, value.narrow(dim, 0, 1)], dim)
