"""Batch norms out of an exported graph: folded where one conv or linear feeds them, else plain.

A batch norm in inference mode is one factor and one term per channel. What cannot be folded is
written as that: a depthwise 1×1 convolution, which is the form that runs fastest, and of which
per-channel int8 weights hold the one factor per channel exactly; or a multiplication and an
addition where there is no such convolution.

Quantizers and delegates fold batch norms on their own, and wrongly where a conv's output has other
users (torchao's `prepare_pt2e` shifts it by as much as the batch norm does), or fail on them
(ExecuTorch's FuseBatchNormPass on a bare nn.Sequential, on Conv3d). In a graph without batch norms
there is nothing they can get wrong.

In an exported graph every use of a tensor is an edge, so "feeds it alone" is exact; and the folded
weight is a new constant, so a weight that others use stays as it is for them.
"""

from typing import Any

import torch
from torch import Tensor, fx

from torchfuse.folding import ChannelAffine, fold_into_weight

__all__ = ["fold_batch_norms"]

aten = torch.ops.aten

_WEIGHTED = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.linear.default,
}
_TRANSPOSED = {
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}
_DEPTHWISE = {3: aten.conv1d.default, 4: aten.conv2d.default}  # by number of input dimensions


def fold_batch_norms(graph_module: fx.GraphModule) -> bool:
    """Take the inference-mode batch norms out of a graph, in place; return whether there were any.

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
        source = _through_dropout(x)
        if _is_foldable(graph_module, norm, source):
            _fold(graph_module, norm, source, affine)
            result = source
        else:
            result = _plain(graph_module, norm, x, affine)
        norm.replace_all_uses_with(result)
        graph_module.graph.erase_node(norm)
        found = True
    if found:
        graph_module.graph.eliminate_dead_code()
        _delete_unused(graph_module)
        graph_module.recompile()
    return found


def _through_dropout(x: fx.Node) -> fx.Node:
    while x.target is aten.dropout.default and not x.args[2] and len(x.users) == 1:
        source = x.args[0]
        assert isinstance(source, fx.Node)
        x = source
    return x


def _is_foldable(graph_module: fx.GraphModule, norm: fx.Node, source: fx.Node) -> bool:
    if source.target not in _WEIGHTED | _TRANSPOSED or len(source.users) != 1:
        return False
    if source.target is aten.linear.default and norm.meta["val"].dim() != 2:
        return False  # the norm's channels are another axis than the linear's features
    if any(isinstance(p, fx.Node) and p.op != "get_attr" for p in source.args[1:3]):
        return False  # a computed weight
    dtype = norm.meta["val"].dtype
    return _tensor(graph_module, source.args[1]).dtype is dtype is source.meta["val"].dtype


def _fold(
    graph_module: fx.GraphModule, norm: fx.Node, source: fx.Node, affine: ChannelAffine
) -> None:
    arguments: list[Any] = [*source.args, None][: max(len(source.args), 3)]
    x, weight, bias, *rest = arguments
    groups = 0
    if source.target in _TRANSPOSED:
        groups = rest[3] if len(rest) > 3 else 1  # stride, padding, output padding, groups
    weight, bias = fold_into_weight(
        _tensor(graph_module, weight),
        None if bias is None else _tensor(graph_module, bias),
        affine,
        transposed_groups=groups,
    )
    with graph_module.graph.inserting_before(source):
        constants = (
            _constant(graph_module, f"_{norm.name}_weight", weight),
            _constant(graph_module, f"_{norm.name}_bias", bias),
        )
    source.args = (x, *constants, *rest)


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
