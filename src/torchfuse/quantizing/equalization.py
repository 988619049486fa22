"""Cross-layer equalisation: every channel of an activation gets to use as much range as it needs.

    W_next · x = (W_next · S⁻¹) · (S · x),   S = diag(s), s > 0

One scale for a whole int8 tensor is as coarse as its largest channel; small channels drown. The
layers that make a tensor are multiplied by s, the ones that read it divided. Between them only what
commutes with a positive factor per channel may lie: ReLU, pooling, additions of tensors that get
the same s.

What clamps from above (ReLU6, hardtanh, hardswish) does not commute: a channel scaled by s would
end at 6/s. What goes through it is left alone.

Where a layer mixes the channels, a column of its weights that grows costs precision in all others
of its row. There s is what makes the least noise at the outputs:

    Σ_tensors (T/255)²/12 · Σ_c a_c/s_c²
    + Σ_layers Σ_o max_i(|W_oi|/s_i / 127)²/12 · Σ_i s_i² · w_oi

with T the whole tensor's range, a and w from `importance.py`.

After Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (2019).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from torchfuse.quantizing.importance import Importance, importance
from torchfuse.quantizing.layerwise import attribute, set_attribute
from torchfuse.quantizing.static import group_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchfuse.cases import Case

__all__ = ["equalize"]

aten = torch.ops.aten

_CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_LINEARS = (aten.linear.default,)
_RELUS = (aten.relu.default, aten.relu_.default)
_ADDS = (aten.add.Tensor, aten.add_.Tensor)
_POOLS = (
    aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default,
    aten.mean.dim,
)  # fmt: skip
_NEUTRAL = (aten.dropout.default, aten.dropout_.default, aten.clone.default)
_RESHAPES = (aten.flatten.using_ints, aten.view.default, aten.reshape.default)
_LARGEST_SCALE = 2.0**10
# A channel that hardly mattered on the data may matter elsewhere: this share of the mean at least.
_LEAST_IMPORTANCE = 0.01
_STEPS = 150
_STEP = 0.05  # of log s
_LEVELS, _WEIGHT_LEVELS = 255, 127


def equalize(graph_module: fx.GraphModule, data: Sequence[Case]) -> int:
    """Equalise an exported graph without batch norms in place; return how many groups of tensors.

    What it computes stays the same up to rounding.
    """
    layers = [n for n in graph_module.graph.nodes if n.target in (*_CONVS, *_LINEARS)]
    found = importance(graph_module, layers, data)
    groups = _groups(graph_module, found.low)
    return sum(_apply(graph_module, group, found) for group in groups)


@dataclass
class _Group:
    """Tensors that must get the same factors, with the layers that make and read them."""

    channels: int
    tensors: list[fx.Node] = field(default_factory=list)
    makers: list[fx.Node] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)
    possible: bool = True


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
    return int(shape[1]) * group_count(node) == group.channels


def _adds_alike(node: fx.Node) -> bool:
    a, b = node.args[:2]
    same = isinstance(a, fx.Node) and isinstance(b, fx.Node)
    return same and a.meta["val"].shape == b.meta["val"].shape and not node.kwargs  # type: ignore[union-attr]


def _commutes(node: fx.Node) -> bool:
    """Whether a positive factor per channel may be moved past the node."""
    if node.target in _RESHAPES:
        source = node.args[0]
        before, after = source.meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
        return len(before) > 2 and len(after) == 2 and tuple(before[:2]) == tuple(after)
    if node.target is aten.mean.dim:
        dims = node.args[1]
        return all(d not in (0, 1) and d in (2, 3, -1, -2) for d in dims)  # type: ignore[union-attr]
    return node.target in (*_RELUS, *_POOLS, *_NEUTRAL)


def _apply(graph_module: fx.GraphModule, group: _Group, found: Importance) -> bool:
    scale = _scales(graph_module, group, found)
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
        by_group = scale.reshape(group_count(node), 1, inputs, *[1] * (weight.dim() - 2))
        rows = weight.double().reshape(group_count(node), -1, *weight.shape[1:])
        set_attribute(graph_module, source.target, (rows / by_group).reshape(weight.shape))
    return True


def _scales(graph_module: fx.GraphModule, group: _Group, found: Importance) -> Tensor:
    """`[channels]` float64; 1 where nothing is to be gained."""
    # What int8 holds is what comes out of an activation, not what goes into it.
    held = [node for node in group.tensors if not _goes_into_activation(node)] or group.tensors
    largest = torch.stack([found.largest(node) for node in held]).amax(0)
    whole = largest.max()
    full = whole / largest.clamp(min=float(whole) / _LARGEST_SCALE)
    full[largest == 0] = 1
    mixing = [node for node in group.readers if group_count(node) != group.channels]
    if not mixing:
        return full
    noise = _Noise(graph_module, held, mixing, found)
    starts = [torch.ones_like(full), full.sqrt(), full]
    scale = _descended(noise, min(starts, key=noise))
    scale[largest == 0] = 1
    return scale


class _Noise:
    """What int8 adds to the outputs, as a function of the factors (the formula at the top)."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        held: Sequence[fx.Node],
        readers: Sequence[fx.Node],
        found: Importance,
    ) -> None:
        self.tensors = [
            (found.low[n].double(), found.high[n].double(), _floored(found.activations[n]))
            for n in held
            if found.activations[n].dim()
        ]
        self.layers = []
        for node in readers:
            weight = attribute(graph_module, node.args[1].target)  # type: ignore[union-attr]
            if group_count(node) == 1 and found.weights[node].dim():
                size = weight.double().abs().reshape(*weight.shape[:2], -1).amax(2)
                self.layers.append((size, found.weights[node]))

    def __call__(self, scale: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for low, high, matters in self.tensors:
            whole = (scale * high).amax().clamp(min=0) - (scale * low).amin().clamp(max=0)
            total = total + (whole / _LEVELS) ** 2 / 12 * (matters / scale**2).sum()
        for size, matters in self.layers:
            step = (size / scale).amax(1) / _WEIGHT_LEVELS
            total = total + (step**2 / 12 * (scale**2 * matters).sum(1)).sum()
        return total


def _floored(matters: Tensor) -> Tensor:
    return matters.clamp(min=float(matters.mean()) * _LEAST_IMPORTANCE)


def _descended(noise: _Noise, start: Tensor) -> Tensor:
    """The factors that make the least noise, sought from `start`."""
    best, lowest = start, float(noise(start))
    logarithm = start.log().requires_grad_()
    optimizer = torch.optim.Adam([logarithm], lr=_STEP)
    for _ in range(_STEPS):
        with torch.enable_grad():
            scale = logarithm.exp().clamp(1 / _LARGEST_SCALE, _LARGEST_SCALE)
            cost = noise(scale)
        if not cost.requires_grad:
            break
        if float(cost.detach()) < lowest:
            best, lowest = scale.detach().clone(), float(cost.detach())
        optimizer.zero_grad()
        cost.backward()
        optimizer.step()
    return best.clone()


def _goes_into_activation(node: fx.Node) -> bool:
    return all(user.target in _RELUS for user in node.users)
