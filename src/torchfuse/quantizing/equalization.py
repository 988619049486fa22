"""Cross-layer equalisation: every channel of an activation gets to use the same range.

    W_next · x = (W_next · S⁻¹) · (S · x),   S = diag(s), s > 0

One scale for a whole int8 tensor is as coarse as its largest channel; small channels drown. The
layers that make a tensor are multiplied by s, the ones that read it divided. Between them only what
commutes with a positive factor per channel may lie: ReLU, pooling, additions of tensors that get
the same s. ReLU6 commutes while its upper bound does not bind: a channel is scaled only as far as
interval arithmetic from the input's range proves that, and left alone otherwise. In int8 the input
is clipped to its calibrated range anyway, so what is proved for that range holds for every input.

After Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (2019).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from torchfuse.quantizing.lockstep import attribute, set_attribute, steps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchfuse.inputs import Case

__all__ = ["equalize"]

aten = torch.ops.aten

_CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_LINEARS = (aten.linear.default,)
_RELUS = (aten.relu.default, aten.relu_.default)
_CLAMPS = (
    aten.hardtanh.default, aten.hardtanh_.default, aten.relu6.default, aten.relu6_.default,
    aten.clamp.default, aten.clamp_.default,
)  # fmt: skip
_ADDS = (aten.add.Tensor, aten.add_.Tensor)
_POOLS = (
    aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default,
    aten.mean.dim,
)  # fmt: skip
_NEUTRAL = (aten.dropout.default, aten.dropout_.default, aten.clone.default)
_RESHAPES = (aten.flatten.using_ints, aten.view.default, aten.reshape.default)
# How much of the difference between channels is moved into the weights of a layer that mixes them:
# there a column that grew costs precision in all others of its row. Depthwise layers take it all.
_MIXED = 0.5
_LARGEST_SCALE = 2.0**10


def equalize(graph_module: fx.GraphModule, data: Sequence[Case]) -> int:
    """Equalise an exported graph without batch norms in place; return how many groups of tensors.

    What it computes stays the same up to rounding, for inputs within the range of `data`.
    """
    ranges, bounds = _ranges(graph_module, data)
    groups = _groups(graph_module, ranges)
    return sum(_apply(graph_module, group, ranges, bounds) for group in groups)


@dataclass
class _Group:
    """Tensors that must get the same factors, with the layers that make and read them."""

    channels: int
    tensors: list[fx.Node] = field(default_factory=list)
    makers: list[fx.Node] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)
    possible: bool = True


def _ranges(
    graph_module: fx.GraphModule, data: Sequence[Case]
) -> tuple[dict[fx.Node, Tensor], dict[fx.Node, tuple[Tensor, Tensor]]]:
    """The largest |value| of each channel, and bounds proved for each from the input's range."""
    largest: dict[fx.Node, Tensor] = {}
    bounds: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    for step, _ in steps(graph_module, data):
        node, first = step.node, step.values[0]
        if not isinstance(first, Tensor) or first.dim() < 2 or not first.is_floating_point():
            continue
        extremes = [_by_channel(value).aminmax(dim=1) for value in step.values]
        low = torch.stack([e.min for e in extremes]).amin(0)
        high = torch.stack([e.max for e in extremes]).amax(0)
        largest[node] = torch.maximum(-low, high)
        if node.op == "placeholder":  # int8 clips a whole tensor, not a channel of it
            bounds[node] = (low.min().expand_as(low), high.max().expand_as(high))
        elif (proved := _bounds(graph_module, node, bounds)) is not None:
            bounds[node] = proved
    return largest, bounds


def _by_channel(value: Tensor) -> Tensor:
    """`[channels, everything else]`."""
    return value.transpose(0, 1).flatten(1) if value.dim() > 1 else value


def _bounds(
    graph_module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor] | None:
    """Interval arithmetic, one interval per channel; None where it is not known how."""
    given = known.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    if given is None:
        return None
    low, high = given
    if node.target in (*_CONVS, *_LINEARS):
        weight = attribute(graph_module, node.args[1].target)  # type: ignore[union-attr]
        bias = _bias(graph_module, node)
        if node.target in _CONVS:  # padding is zeros
            low, high = low.clamp(max=0), high.clamp(min=0)
        groups = _group_count(node)
        rows = weight.flatten(2).double() if weight.dim() > 2 else weight[..., None].double()
        inputs = torch.arange(len(low)).reshape(groups, -1)
        inputs = inputs.repeat_interleave(weight.shape[0] // groups, 0)
        lows, highs = low.double()[inputs][..., None], high.double()[inputs][..., None]
        positive, negative = rows.clamp(min=0), rows.clamp(max=0)
        smallest = (positive * lows + negative * highs).sum((1, 2))
        largest = (positive * highs + negative * lows).sum((1, 2))
        shift = 0 if bias is None else bias.double()
        return smallest + shift, largest + shift
    if node.target in _RELUS:
        return low.clamp(min=0), high.clamp(min=0)
    if node.target in _CLAMPS:
        floor, ceiling = _clamp_limits(node)
        return low.clamp(floor, ceiling), high.clamp(floor, ceiling)
    if node.target in _ADDS and isinstance(node.args[1], fx.Node):
        other = known.get(node.args[1])
        if other is None or len(other[0]) != len(low):
            return None
        return low + other[0], high + other[1]
    if node.target in (*_POOLS, *_NEUTRAL):
        return low.clamp(max=0), high.clamp(min=0)  # an average may count padding
    return None


def _clamp_limits(node: fx.Node) -> tuple[float | None, float | None]:
    if "relu6" in str(node.target):
        return 0.0, 6.0
    defaults = (-1.0, 1.0) if "hardtanh" in str(node.target) else (None, None)
    given = [*node.args[1:3], *defaults[len(node.args) - 1 :]]
    return given[0], given[1]


def _bias(graph_module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    bias = node.args[2] if len(node.args) > 2 else None
    return attribute(graph_module, bias.target) if isinstance(bias, fx.Node) else None


def _group_count(node: fx.Node) -> int:
    if node.target in _LINEARS:
        return 1
    return int(node.args[6]) if len(node.args) > 6 else 1  # type: ignore[arg-type]


def _groups(graph_module: fx.GraphModule, ranges: dict[fx.Node, Tensor]) -> list[_Group]:
    """The groups, in the order their first tensors are made."""
    member: dict[fx.Node, _Group] = {}

    def joined(a: _Group, b: _Group) -> _Group:
        if a is not b:
            a.possible = a.possible and b.possible and a.channels == b.channels
            a.tensors += b.tensors
            a.makers += b.makers
            a.readers += b.readers
            for node in b.tensors:
                member[node] = a
        return a

    def joining(node: fx.Node, group: _Group) -> None:
        group.tensors.append(node)
        member[node] = group
        if node not in ranges or len(ranges[node]) != group.channels:
            group.possible = False

    for node in graph_module.graph.nodes:
        sources = [source for source in node.all_input_nodes if source in member]
        if node.target in (*_CONVS, *_LINEARS):
            for source in sources:
                group = member[source]
                group.readers.append(node)
                if source is not node.args[0] or not _reads_by_channel(graph_module, node, group):
                    group.possible = False
            if node in ranges:
                group = _Group(len(ranges[node]), makers=[node])
                group.possible = _owns_its_weights(node) and (
                    node.target in _CONVS or ranges[node].dim() == 1
                )
                joining(node, group)
        elif node.target in _ADDS and len(sources) == 2 and _adds_alike(node):
            joining(node, joined(member[sources[0]], member[sources[1]]))
        elif len(sources) == 1 and _commutes(node):
            joining(node, member[sources[0]])
        else:
            for source in sources:
                if node.target is not aten.sym_size.int:
                    member[source].possible = False
    unique = {id(group): group for group in member.values()}
    return [group for group in unique.values() if group.possible and group.readers]


def _owns_its_weights(node: fx.Node) -> bool:
    parameters = [source for source in node.args[1:3] if isinstance(source, fx.Node)]
    return all(source.op == "get_attr" and len(source.users) == 1 for source in parameters) and all(
        sum(other.op == "get_attr" and other.target == source.target for other in node.graph.nodes)
        == 1
        for source in parameters
    )


def _reads_by_channel(graph_module: fx.GraphModule, node: fx.Node, group: _Group) -> bool:
    weight = node.args[1]
    if not _owns_its_weights(node) or not isinstance(weight, fx.Node):
        return False
    shape = attribute(graph_module, weight.target).shape
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dims = source.meta["val"].dim()
    if node.target in _LINEARS and dims != 2:  # channels would not be on axis 1
        return False
    return int(shape[1]) * _group_count(node) == group.channels


def _adds_alike(node: fx.Node) -> bool:
    a, b = node.args[:2]
    same = isinstance(a, fx.Node) and isinstance(b, fx.Node)
    return same and a.meta["val"].shape == b.meta["val"].shape and not node.kwargs  # type: ignore[union-attr]


def _commutes(node: fx.Node) -> bool:
    """Whether a positive factor per channel may be moved past the node (for clamps: if proved)."""
    if node.target in _CLAMPS:
        floor, ceiling = _clamp_limits(node)
        return floor == 0 and ceiling is not None
    if node.target in _RESHAPES:
        source = node.args[0]
        before, after = source.meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
        return len(before) > 2 and len(after) == 2 and tuple(before[:2]) == tuple(after)
    if node.target is aten.mean.dim:
        dims = node.args[1]
        return all(d not in (0, 1) and d in (2, 3, -1, -2) for d in dims)  # type: ignore[union-attr]
    return node.target in (*_RELUS, *_POOLS, *_NEUTRAL)


def _apply(
    graph_module: fx.GraphModule,
    group: _Group,
    ranges: dict[fx.Node, Tensor],
    bounds: dict[fx.Node, tuple[Tensor, Tensor]],
) -> bool:
    scale = _scales(graph_module, group, ranges, bounds)
    if not (scale != 1).any():
        return False
    for node in group.makers:
        for position in (1, 2):
            source = node.args[position] if len(node.args) > position else None
            if isinstance(source, fx.Node):
                tensor = attribute(graph_module, source.target)
                factor = scale.reshape(-1, *[1] * (tensor.dim() - 1))
                set_attribute(graph_module, source.target, tensor.double() * factor)
    for node in group.readers:
        source = node.args[1]
        assert isinstance(source, fx.Node)
        weight = attribute(graph_module, source.target)
        inputs = weight.shape[1]
        by_group = scale.reshape(_group_count(node), 1, inputs, *[1] * (weight.dim() - 2))
        rows = weight.double().reshape(_group_count(node), -1, *weight.shape[1:])
        set_attribute(graph_module, source.target, (rows / by_group).reshape(weight.shape))
    return True


def _scales(
    graph_module: fx.GraphModule,
    group: _Group,
    ranges: dict[fx.Node, Tensor],
    bounds: dict[fx.Node, tuple[Tensor, Tensor]],
) -> Tensor:
    """`[channels]` float64; 1 where nothing is to be gained or proved."""
    clamps = [node for node in group.tensors if node.target in _CLAMPS]
    # What int8 holds is what comes out of an activation, not what goes into it.
    held = [node for node in group.tensors if not _goes_into_activation(node)] or group.tensors
    largest = torch.stack([ranges[node] for node in held]).amax(0).double()
    whole = largest.max()
    scale = whole / largest.clamp(min=float(whole) / _LARGEST_SCALE)
    if not all(_group_count(node) == group.channels for node in group.readers):
        columns = [_columns(graph_module, node) for node in group.readers]
        weights = torch.stack(columns).amax(0)
        # Rows and columns meet halfway: |s·x| against |W/s|.
        balance = weights.clamp(min=1e-12) ** (1 - _MIXED) / largest.clamp(min=1e-12) ** _MIXED
        balance = balance / (balance * largest).max() * whole
        scale = torch.minimum(scale, balance)
    scale[largest == 0] = 1
    for node in clamps:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        _, ceiling = _clamp_limits(node)
        assert ceiling is not None
        if source not in bounds:
            return torch.ones_like(scale)
        proved = bounds[source][1]
        room = ceiling / proved.clamp(min=ceiling / _LARGEST_SCALE)
        never_binds = proved * (1 + 1e-6) < ceiling
        scale = torch.where(never_binds, torch.minimum(scale, room), torch.ones_like(scale))
    return scale


def _goes_into_activation(node: fx.Node) -> bool:
    return all(user.target in (*_RELUS, *_CLAMPS) for user in node.users)


def _columns(graph_module: fx.GraphModule, node: fx.Node) -> Tensor:
    """`[channels]`: the largest |weight| that reads each channel, relative to its row's largest."""
    source = node.args[1]
    assert isinstance(source, fx.Node)
    weight = attribute(graph_module, source.target).double()
    groups = _group_count(node)
    size = weight.flatten(2).abs().amax(2) if weight.dim() > 2 else weight.abs()
    size = size / size.amax(1, keepdim=True).clamp(min=1e-12)
    return size.reshape(groups, -1, weight.shape[1]).amax(1).flatten()
