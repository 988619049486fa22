r"""Batch norms that no fusion takes, written as what they are: one factor and one term per channel.

    y = x · s + t,    s = γ / √(σ² + ε),    t = β − μ · s        [channels]

Quantizers and delegates fold batch norms on their own, and wrongly where a conv's output has other
users (torchao's `prepare_pt2e` shifts it by as much as the batch norm does). In a program without
batch norms there is nothing they can fold. A depthwise 1×1 convolution is the form that runs
fastest, and per-channel int8 weights hold its one factor per channel exactly.
"""

from typing import Any

import torch
from torch import fx

__all__ = ["rewrite_batch_norms"]

aten = torch.ops.aten

_CONVOLUTIONS = {3: aten.conv1d.default, 4: aten.conv2d.default}  # by number of input dimensions


def rewrite_batch_norms(graph_module: fx.GraphModule) -> int:
    """Replace the inference-mode batch norms of an exported model in place; return how many.

    Those that use the batch's own statistics are left as they are.
    """
    rewritten = 0
    for node in list(graph_module.graph.nodes):
        if node.target is not aten.batch_norm.default:
            continue
        x, weight, bias, mean, variance, training, _momentum, eps = node.args[:8]
        if training or mean is None or variance is None:
            continue
        factor = (_tensor(graph_module, variance) + eps).rsqrt()
        if weight is not None:
            factor = factor * _tensor(graph_module, weight)
        term = -_tensor(graph_module, mean) * factor
        if bias is not None:
            term = term + _tensor(graph_module, bias)
        dtype = x.meta["val"].dtype
        with graph_module.graph.inserting_before(node):
            y = _scaled(graph_module, node, x, factor.to(dtype), term.to(dtype))
        node.replace_all_uses_with(y)
        graph_module.graph.erase_node(node)
        rewritten += 1
    if rewritten:
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()
    return rewritten


def _scaled(
    graph_module: fx.GraphModule,
    norm: fx.Node,
    x: fx.Node,
    factor: torch.Tensor,
    term: torch.Tensor,
) -> fx.Node:
    channels, dims = factor.numel(), x.meta["val"].dim()

    def constant(name: str, value: torch.Tensor) -> fx.Node:
        name = f"_{norm.name}_{name}"
        graph_module.register_buffer(name, value)
        node = graph_module.graph.get_attr(name)
        node.meta["val"] = value
        return node

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph_module.graph.call_function(target, args)
        node.meta = dict(norm.meta)
        return node

    if convolution := _CONVOLUTIONS.get(dims):
        kernel = [1] * (dims - 2)
        weight = constant("factor", factor.reshape(channels, 1, *kernel))
        zeros = [0] * len(kernel)
        return call(convolution, x, weight, constant("term", term), kernel, zeros, kernel, channels)
    along_channels = (channels, *[1] * (dims - 2))
    product = call(aten.mul.Tensor, x, constant("factor", factor.reshape(along_channels)))
    return call(aten.add.Tensor, product, constant("term", term.reshape(along_channels)))


def _tensor(graph_module: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    owner: Any = graph_module
    for name in str(node.target).split("."):
        owner = getattr(owner, name)
    assert isinstance(owner, torch.Tensor)
    return owner.detach().double()
