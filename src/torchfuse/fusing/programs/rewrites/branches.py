"""branches of one input, added: one layer.

    W₁ ⊛ x + (W₂ ⊛ x + b₂) + γ · x + x + avg(x) = (W₁ + W₂ + diag(γ) + 1 + 1/k²) ⊛ x + b₂

Kernels are padded to the larger one, groups written with zeros between them where that costs no
more than the branches did. A branch may be a chain of layers and affines. What else is in the sum
stays. `+`, `-`, in place or not, `torch.add(…, alpha=…)`, `sum([…])`, `torch.stack([…]).sum(0)` and
`.mean(0)`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from torchfuse.algebra import (
    Affine,
    Layer,
    after,
    as_layer,
    average_pool,
    before,
    compose,
    padded,
    plus,
    then,
    trimmed,
)
from torchfuse.fusing.programs.reading import AffineCall, LayerCall, arguments, same_shape
from torchfuse.fusing.programs.rewrites._carriers import AVERAGES, average_arguments, zeros_around
from torchfuse.fusing.programs.rewrites._rewrite import Edit, NewCall, Rewrite, layer_of
from torchfuse.planning import Refusal

if TYPE_CHECKING:
    from torchfuse.fusing.programs.reading import Reading

__all__ = ["REWRITE"]

aten = torch.ops.aten

_ADDS = (aten.add.Tensor, aten.add_.Tensor)
_SUBS = (aten.sub.Tensor, aten.sub_.Tensor)
# Calls in a branch; what is longer is no branch that was meant to be merged.
_LONGEST = 6


@dataclass(frozen=True, eq=False)
class _Term:
    """One entry of a sum."""

    node: Node
    factor: float  # it is added so many times


@dataclass(frozen=True, eq=False)
class _Pool:
    """An average pool that a convolution can stand for."""

    node: Node
    x: Node
    layer: Layer
    axis: int


@dataclass(frozen=True, eq=False)
class _Padding:
    """Zeros around what a convolution is given, more on one side than on the other."""

    node: Node
    x: Node
    begin: tuple[int, ...]  # per spatial axis
    end: tuple[int, ...]
    axis: int


_Call = LayerCall | AffineCall | _Pool | _Padding


@dataclass(frozen=True, eq=False)
class _Branch:
    """A term as calls on `source`, in running order; none: it is the source."""

    term: _Term
    source: Node
    calls: tuple[_Call, ...]

    @property
    def axis(self) -> int | None:
        """Of the channels; None if it has none."""
        return next((call.axis for call in self.calls if call.axis is not None), None)

    @property
    def groups(self) -> tuple[int, ...]:
        """Of its layers."""
        return tuple(call.layer.groups for call in self.calls if isinstance(call, LayerCall))

    @property
    def paddings(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """Before and after each axis, of what is padded apart from its layers."""
        return tuple((call.begin, call.end) for call in self.calls if isinstance(call, _Padding))


def _find(reading: Reading, node: Node) -> list[Edit | Refusal]:
    if not _is_sum(reading, node):
        return _scaled_by_what_is_computed(reading, node)
    reader = reading.only_reader(node)
    if reader is not None and _is_sum(reading, reader) and _adds_whole(node, reader):
        return []  # looked at as a part of the larger sum
    inner: list[Node] = []
    terms = _terms(reading, node, 1.0, node, inner)
    branches = [_branches(reading, term, node) for term in terms]
    counted = Counter(
        source for found in branches for source in dict.fromkeys(b.source for b in found)
    )
    edits: list[Edit | Refusal] = []
    for source, times in counted.most_common():
        if times < 2:
            break
        chosen = [
            next(branch for branch in found if branch.source is source)
            for found in branches
            if any(branch.source is source for branch in found)
        ]
        edits += [_edit(reading, group, terms, inner) for group in _groups(chosen)]
    return edits


def _groups(branches: list[_Branch]) -> list[list[_Branch]]:
    """What could be merged, the most first: all, then those that agree in what could prevent it.

    Padding on one side may need a kernel that costs more, or lie between the taps of the others.
    """
    paddings = Counter(branch.paddings for branch in branches)
    found = _grouped(branches)
    if len(paddings) > 1:
        for alike in ([b for b in branches if b.paddings == sides] for sides in sorted(paddings)):
            found += _grouped(alike) if len(alike) > 1 else []
    return found


def _grouped(branches: list[_Branch]) -> list[list[_Branch]]:
    """All, then those whose layers have as many groups."""
    found = [branches]
    layered = Counter(branch.groups for branch in branches if branch.groups)
    if len(layered) > 1:
        for groups, _ in layered.most_common():
            alike = [branch for branch in branches if branch.groups in ((), groups)]
            if len(alike) > 1:
                found.append(alike)
        found += [
            alike
            for groups, times in layered.most_common()
            if times > 1
            for alike in [[branch for branch in branches if branch.groups == groups]]
        ]
    return [group for group in found if any(_has_layer(branch) for branch in group)]


def _has_layer(branch: _Branch) -> bool:
    return any(isinstance(call, LayerCall) for call in branch.calls)


def _edit(reading: Reading, group: list[_Branch], terms: list[_Term], inner: list[Node]) -> Edit:
    merged = {id(branch.term) for branch in group}
    rest = [term for term in terms if id(term) not in merged]
    position = reading.memory.position
    nodes = {*inner, *(call.node for branch in group for call in branch.calls)}
    goes = tuple(sorted(nodes, key=position.__getitem__))
    layers = [call for b in group for call in b.calls if isinstance(call, LayerCall)]
    # The merged layer is called as the largest of them, which users look for.
    largest = max(layers, key=lambda call: call.layer.weight.numel()).node

    def result() -> NewCall | Node | Refusal:
        layer = _sum(group)
        if isinstance(layer, Refusal):
            return layer
        source: Any = group[0].source
        if any(isinstance(call, _Padding) for branch in group for call in branch.calls):
            layer, begin, end = trimmed(layer)
            if any((*begin, *end)):
                sizes = [side for pair in zip(begin, end, strict=True) for side in reversed(pair)]
                source = NewCall(aten.constant_pad_nd.default, (source, sizes[::-1]))
        made: Any = layer_of(layer, source)
        for term in rest:
            target = aten.sub.Tensor if term.factor == -1 else aten.add.Tensor
            scaled = {} if abs(term.factor) == 1 else {"alpha": term.factor}
            made = NewCall(target, (made, term.node), scaled)
        assert isinstance(made, (NewCall, Refusal))
        return made

    return Edit(goes, result, named_after=largest)


def _sum(group: list[_Branch]) -> Layer | Refusal:
    """The layer that all branches are together."""
    axis = next(b.axis for b in group if _has_layer(b))
    layers: list[Layer] = []
    affines: list[tuple[Affine | None, float]] = []
    for branch in group:
        if branch.axis not in (None, axis):
            return Refusal("The branches are not along the same axis.")
        made = _as_one(branch)
        if isinstance(made, Refusal):
            return made
        if isinstance(made, Layer):
            signed = after(_scaling(branch.term.factor), made)
            if isinstance(signed, Refusal):
                return signed
            layers.append(signed)
        else:
            affines.append((made, branch.term.factor))
    # The largest first: what is added to it then makes it hardly larger.
    layers.sort(key=lambda layer: layer.weight.numel(), reverse=True)
    total: Layer | Refusal = layers[0]
    for layer in layers[1:]:
        total = _plus(total, layer)
    for affine, factor in affines:
        if isinstance(total, Refusal):
            return total
        signed_affine = then(affine, _scaling(factor)) if affine else _scaling(factor)
        total = _plus(total, as_layer(signed_affine, total))
    return total


def _scaling(factor: float) -> Affine:
    return Affine(torch.tensor([factor], dtype=torch.float64), torch.zeros(1).double())


def _plus(a: Layer | Refusal, b: Layer | Refusal) -> Layer | Refusal:
    if isinstance(a, Refusal):
        return a
    return b if isinstance(b, Refusal) else plus(a, b)


def _as_one(branch: _Branch) -> Layer | Affine | Refusal | None:
    """The calls of a branch as one layer or affine; None: the identity."""
    made: Layer | Affine | Refusal | None = None
    around: _Padding | None = None
    for call in branch.calls:
        if isinstance(made, Refusal):
            return made
        if isinstance(call, _Padding):
            around = call  # of the layer that follows
        elif isinstance(call, AffineCall):
            if made is None:
                made = call.affine
            elif isinstance(made, Affine):
                made = then(made, call.affine)
            else:
                made = after(call.affine, made)
        else:
            layer = call.layer if isinstance(call, _Pool) else call.exact
            if around is not None:
                wider, around = padded(layer, around.begin, around.end), None
                if isinstance(wider, Refusal):
                    return wider
                layer = wider
            if made is None:
                made = layer
            else:
                made = before(layer, made) if isinstance(made, Affine) else compose(made, layer)
    return made


def _branches(reading: Reading, term: _Term, total: Node) -> list[_Branch]:
    """The term on each of the values that it comes from, by calls that nobody else reads."""
    found = [_Branch(term, term.node, ())]
    calls: list[_Call] = []
    current = term.node
    if not _is_like(current, total):
        return []
    # What somebody else reads has to be computed anyway: nothing is gained by merging past it.
    while len(calls) < _LONGEST and len(current.users) == 1:
        call: _Call | None = reading.layer(current) or reading.affine(current) or _pool(current)
        if call is None and calls:
            call = _padding(current, calls[0])
        if call is None:
            break
        axes = {c.axis for c in (*calls, call) if c.axis is not None}
        if len(axes) > 1:
            break
        calls.insert(0, call)
        current = call.x
        found.append(_Branch(term, current, tuple(calls)))
    return found


def _padding(node: Node, reader: _Call) -> _Padding | None:
    """The zeros around what `reader`, a convolution, is given."""
    if not isinstance(reader, LayerCall) or reader.layer.transposed:
        return None
    sides = zeros_around(node, len(reader.layer.kernel))
    x = node.args[0] if node.args else None
    if sides is None or not isinstance(x, Node):
        return None
    return _Padding(node, x, *sides, reader.axis)


def _pool(node: Node) -> _Pool | None:
    if node.target not in AVERAGES:
        return None
    x = node.args[0]
    assert isinstance(x, Node)
    kernel, stride, padding, ceil, counts, divisor = average_arguments(node)
    given = x.meta["val"]
    axis = given.dim() - 1 - len(kernel)
    channels = given.shape[axis]
    if ceil or (any(padding) and not counts) or not isinstance(channels, int):
        return None
    return _Pool(node, x, average_pool(channels, kernel, stride, padding, divisor), axis)


# ── sums ─────────────────────────────────────────────────────────────────────────────────────────


def _is_sum(reading: Reading, node: Node) -> bool:
    """Whether a call adds values that are computed."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
        return False
    if node.target in (*_ADDS, *_SUBS):
        a, b, alpha = arguments(node)
        return isinstance(alpha, (int, float)) and all(
            isinstance(given, Node)
            and isinstance(given.meta.get("val"), Tensor)
            and not reading.is_constant(given)
            and given.meta["val"].dtype is node.meta["val"].dtype
            for given in (a, b)
        )
    return _stacked(node) is not None


def _scaled_by_what_is_computed(reading: Reading, node: Node) -> list[Edit | Refusal]:
    """Why branches are not merged whose factor is a size of an input, say."""
    if node.target not in (*_ADDS, *_SUBS) or not isinstance(arguments(node)[2], Node):
        return []
    found = [
        {branch.source for branch in _branches(reading, _Term(given, 1.0), node)}
        for given in arguments(node)[:2]
        if isinstance(given, Node) and isinstance(given.meta.get("val"), Tensor)
    ]
    if len(found) < 2 or found[0].isdisjoint(found[1]):
        return []
    return [Refusal("The factor of its second branch, alpha, is computed in the model.")]


def _stacked(node: Node) -> Node | None:
    """The stack that a call sums, or averages, over its new axis."""
    if node.target not in (aten.sum.dim_IntList, aten.mean.dim):
        return None
    stack, summed, keeps, dtype = arguments(node)
    if stack.target is not aten.stack.default or len(stack.users) > 1 or keeps or dtype:
        return None
    rank = stack.meta["val"].dim()
    axis = arguments(stack)[1] % rank
    return stack if [dim % rank for dim in summed or ()] == [axis] else None


def _adds_whole(node: Node, reader: Node) -> bool:
    """Whether a larger sum adds this one as it is, once."""
    if _stacked(reader) is not None or reader.args[0] is reader.args[1]:
        return False
    return same_shape(node.meta["val"].shape, reader.meta["val"].shape)


def _terms(
    reading: Reading, node: Node, factor: float, total: Node, inner: list[Node]
) -> list[_Term]:
    """What a sum adds, the sums in it taken apart; these go to `inner`."""
    inner.append(node)
    stack = _stacked(node)
    if stack is not None:
        inner.append(stack)
        entries = stack.args[0]
        assert isinstance(entries, (list, tuple))
        if node.target is aten.mean.dim:
            factor /= len(entries)
        given = [(entry, factor) for entry in entries if isinstance(entry, Node)]
    else:
        a, b, alpha = arguments(node)
        assert isinstance(a, Node)
        assert isinstance(b, Node)
        given = [(a, factor), (b, factor * (-alpha if node.target in _SUBS else alpha))]
    terms: list[_Term] = []
    for entry, its in given:
        alone = len(entry.users) == 1 and sum(other is entry for other, _ in given) == 1
        if alone and _is_like(entry, total) and _is_sum(reading, entry):
            terms += _terms(reading, entry, its, total, inner)
        else:
            terms.append(_Term(entry, its))
    return terms


def _is_like(entry: Node, total: Node) -> bool:
    """Whether a sum adds it as it is: not broadcast, nor of a stack as a wider dtype."""
    given, made = entry.meta["val"], total.meta["val"]
    return given.dtype is made.dtype and same_shape(given.shape, made.shape)


REWRITE = Rewrite(
    "branches",
    "convolutions, norms, average pools and the identity of one input, added, made one convolution",
    "conv3x3(x) + conv1x1(x) + bn(x) → conv3x3'(x)",
    _find,
)
