"""Batch norms that cannot be folded, written as what they are: one factor and one term per channel.

As a depthwise 1×1 convolution, which is the form that runs fastest, and of which per-channel int8
weights hold the one factor per channel exactly; or as a multiplication and an addition where there
is no such convolution.

Quantizers and delegates fold batch norms on their own, and wrongly where a conv's output has other
users (torchao's `prepare_pt2e` shifts it by as much as the batch norm does), or fail on them
(ExecuTorch's FuseBatchNormPass on a bare nn.Sequential, on Conv3d). In a graph without batch norms
there is nothing they can get wrong.
"""

from typing import Any

import torch
from torch import Tensor, fx

from torchfuse.algebra.folding import ChannelAffine

__all__ = ["write_batch_norms_plainly"]

aten = torch.ops.aten

_DEPTHWISE = {3: aten.conv1d.default, 4: aten.conv2d.default}  # by number of input dimensions


def write_batch_norms_plainly(graph_module: fx.GraphModule) -> bool:
    """Replace the inference-mode batch norms of a graph, in place; return whether there were any.

    Those that use the batch's own statistics are left as they are.
    """
    found = False
    for norm in list(graph_module.graph.nodes):
        if norm.target is not aten.batch_norm.default:
            continue
        x, gamma, beta, mean, variance, training, _momentum, eps = norm.args[:8]
        if training or mean is None or variance is None:
            continue
        affine = ChannelAffine.of_batch_norm(
            _tensor(graph_module, mean),
            _tensor(graph_module, variance),
            eps,
            None if gamma is None else _tensor(graph_module, gamma),
            None if beta is None else _tensor(graph_module, beta),
        )
        norm.replace_all_uses_with(_plain(graph_module, norm, x, affine))
        graph_module.graph.erase_node(norm)
        found = True
    if found:
        graph_module.graph.eliminate_dead_code()
        _delete_unused(graph_module)
        graph_module.recompile()
    return found


def _plain(
    graph_module: fx.GraphModule, norm: fx.Node, x: fx.Node, affine: ChannelAffine
) -> fx.Node:
    value = x.meta["val"]
    channels, dims = affine.scale.numel(), value.dim()
    depthwise = _DEPTHWISE.get(dims)
    shape = (channels, *[1] * (dims - (1 if depthwise else 2)))
    graph = graph_module.graph

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta = dict(norm.meta)
        return node

    with graph.inserting_before(norm):
        scale = affine.scale.to(value.dtype).reshape(shape)
        factor = _constant(graph_module, f"_{norm.name}_factor", scale)
        if depthwise:
            term = _constant(graph_module, f"_{norm.name}_term", affine.shift.to(value.dtype))
            ones, zeros = [1] * (dims - 2), [0] * (dims - 2)
            return call(depthwise, x, factor, term, ones, zeros, ones, channels)
        shift = affine.shift.to(value.dtype).reshape(shape)
        term = _constant(graph_module, f"_{norm.name}_term", shift)
        return call(aten.add.Tensor, call(aten.mul.Tensor, x, factor), term)


def _constant(graph_module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    graph_module.register_buffer(name, value)
    node = graph_module.graph.get_attr(name)
    node.meta["val"] = value
    return node


def _delete_unused(graph_module: fx.GraphModule) -> None:
    # Exported again, they would be inputs of the program that nothing reads.
    used = {node.target for node in graph_module.graph.nodes if node.op == "get_attr"}
    names = [name for name, _ in graph_module.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in graph_module.named_buffers(remove_duplicate=False)]
    for name in set(names) - used:
        owner, _, attribute = name.rpartition(".")
        delattr(graph_module.get_submodule(owner), attribute)


def _tensor(graph_module: fx.GraphModule, node: Any) -> Tensor:
    owner: Any = graph_module
    for name in str(node.target).split("."):
        owner = getattr(owner, name)
    assert isinstance(owner, Tensor)
    return owner.detach()
