"""What can be done with linear layers, exactly: scale, shift, compose, add. It knows no graph.

    layer    y = W ⊛ x + b           convolutions of any dimensions, transposed ones, linear layers
    affine   y_c = s_c · x_c + t_c   one scale and one shift per channel

Tensors in, tensors out, float64 inside; nothing is written to. What cannot be done exactly is a
`Refusal`, a sentence. Shapes: `[out, in/groups, *kernel]`, a linear layer's without a kernel, a
transposed convolution's `[in, out/groups, *kernel]`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from math import gcd, prod

import torch
from torch import Tensor

from torchfuse.planning import Refusal

__all__ = [
    "Affine",
    "Layer",
    "after",
    "as_layer",
    "average_pool",
    "before",
    "compose",
    "padded",
    "plus",
    "regrouped",
    "then",
    "trimmed",
]


# A weight of more elements is made only if it is not much larger than those it is made of: written
# out, the zeros between the groups of a wide depthwise convolution alone would fill the memory.
_LARGE = 1 << 22
_MUCH = 4


@dataclass(frozen=True, eq=False)
class Affine:
    """y_c = scale_c · x_c + shift_c; of one element each where all channels have the same."""

    scale: Tensor  # [channels] or [1] float64
    shift: Tensor  # [channels] or [1] float64

    @property
    def shifts(self) -> bool:
        """Whether zero does not stay zero."""
        return bool(self.shift.any())


@dataclass(frozen=True, eq=False)
class Layer:
    """y = W ⊛ x + b. All sizes are per spatial dimension; a linear layer has none."""

    weight: Tensor  # float64
    bias: Tensor | None  # [out] float64
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()  # with zeros, on both sides
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the kernel; none for a linear layer."""
        return tuple(self.weight.shape[2:])

    @property
    def channels_in(self) -> int:
        """Number of input channels or features."""
        return self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups

    @property
    def channels_out(self) -> int:
        """Number of output channels or features."""
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]


def then(first: Affine, second: Affine) -> Affine:
    """Return `second` of `first` as one: s = s₂ · s₁, t = s₂ · t₁ + t₂."""
    return Affine(second.scale * first.scale, second.scale * first.shift + second.shift)


def after(affine: Affine, layer: Layer) -> Layer | Refusal:
    """Return the layer that includes the affine of its output.

    W' = W · s       along the out channels
    b' = b · s + t   [out]
    """
    out = layer.channels_out
    if _misfit(affine, out):
        return Refusal(f"There are {affine.scale.numel()} scales for {out} output channels.")
    scale, shift = affine.scale.expand(out), affine.shift.expand(out)
    bias = scale * layer.bias + shift if layer.bias is not None else shift.clone()
    if layer.bias is None and not affine.shifts:
        return replace(layer, weight=_along_out(layer, scale))
    return replace(layer, weight=_along_out(layer, scale), bias=bias)


def before(layer: Layer, affine: Affine) -> Layer | Refusal:
    """Return the layer that includes the affine of its input.

        W' = W · s           along the in channels
        b' = b + Σ W · t     summed over the in channels and the kernel

    Zero padding is not shifted, and a transposed convolution reaches its border less often: there
    only a scale can be taken in.
    """
    channels = layer.channels_in
    if _misfit(affine, channels):
        return Refusal(f"There are {affine.scale.numel()} scales for {channels} input channels.")
    if affine.shifts and any(layer.padding):
        return Refusal(
            "The zeros of its padding are not shifted, so a shift before it cannot be taken in.",
            "Pad before the shift, or use no padding.",
        )
    if affine.shifts and layer.transposed:
        return Refusal("A shift before a transposed convolution is not the same at its border.")
    scaled = replace(layer, weight=_along_in(layer, affine.scale.expand(channels)))
    if not affine.shifts:
        return scaled
    moved = _along_in(layer, affine.shift.expand(channels)).flatten(1).sum(1)
    return replace(scaled, bias=moved if layer.bias is None else layer.bias + moved)


def compose(first: Layer, second: Layer) -> Layer | Refusal:
    """Return `second` of `first` as one layer.

        W[o, i, s₁·d₂·β + d₁·α] += Σ_m W₂[o, m, β] · W₁[m, i, α]
        b = b₂ + Σ W₂ · b₁

    Zeros that pad what `first` gives are not what it would give there, so `second` has no padding,
    or `first` is 1×1, without stride, padding and bias.
    """
    if first.transposed or second.transposed:
        return Refusal("Transposed convolutions are not composed.")
    if len(first.kernel) != len(second.kernel) or first.channels_out != second.channels_in:
        return Refusal("The two layers are of different kinds.")
    # A 1×1 convolution makes zeros of zeros, so padding before it or after it is the same; its bias
    # is the next question.
    one = all(k == s == 1 and p == 0 for k, s, p in zip(*_sizes(first), strict=True))
    if any(second.padding) and not one:
        return Refusal("The second convolution pads what the first one gives.")
    # The bias of the first is a shift before the second, and as inexact where that pads.
    shifted = before(second, Affine(torch.ones(1).double(), _bias(first)))
    if isinstance(shifted, Refusal):
        return Refusal(
            "The first convolution has a bias, and the second pads with zeros that do not."
        )
    groups = gcd(first.groups, second.groups)
    size: list[int] = []
    dilation: list[int] = []
    for k1, k2, s1, d1, d2 in zip(
        first.kernel, second.kernel, first.stride, first.dilation, second.dilation, strict=True
    ):
        # The taps of the result lie at s₁·d₂·β + d₁·α. If one kernel has a single tap, they are
        # multiples of the other's distance, which is then the dilation: nothing is stored for the
        # places in between.
        step = s1 * d2 if k1 == 1 else d1 if k2 == 1 else 1
        dilation.append(step)
        size.append((s1 * d2 * (k2 - 1) + d1 * (k1 - 1)) // step + 1)
    out, middle, into = second.channels_out, second.channels_in, first.channels_in
    refusal = _too_large(out * (into // groups) * prod(size), first, second)
    if refusal is not None:
        return refusal
    weight = torch.zeros(out, into // groups, *size, dtype=first.weight.dtype)
    first, second = regrouped(first, groups), regrouped(second, groups)
    one_by_group = first.weight.reshape(groups, middle // groups, into // groups, *first.kernel)
    two_by_group = second.weight.reshape(groups, out // groups, middle // groups, *second.kernel)
    for a in product(*map(range, first.kernel)):
        for b in product(*map(range, second.kernel)):
            at = tuple(
                (s1 * d2 * j + d1 * i) // step
                for i, j, s1, d1, d2, step in zip(
                    a, b, first.stride, first.dilation, second.dilation, dilation, strict=True
                )
            )
            taps = _tap(two_by_group, b) @ _tap(one_by_group, a)
            _tap(weight, at).add_(taps.flatten(0, 1))
    return Layer(
        weight,
        None if first.bias is None and second.bias is None else shifted.bias,
        tuple(a * b for a, b in zip(first.stride, second.stride, strict=True)),
        tuple(
            p1 + s1 * p2
            for p1, s1, p2 in zip(first.padding, first.stride, second.padding, strict=True)
        ),
        tuple(dilation),
        groups,
    )


def plus(a: Layer, b: Layer) -> Layer | Refusal:
    """Return the layer that gives the sum of what two layers make of one input.

        W = W_a + W_b   each kernel with zeros around it where the other is larger, or padded more
        b = b_a + b_b

    Its groups are the greatest that both can be written in.
    """
    if a.channels_in != b.channels_in or a.channels_out != b.channels_out:
        return Refusal("The two layers have different numbers of channels.")
    same = len(a.kernel) == len(b.kernel) and a.transposed == b.transposed
    if not same or a.stride != b.stride:
        return Refusal("The two layers step over their input differently.")
    if a.transposed:
        geometry = [(x.kernel, x.padding, x.dilation, x.groups, x.output_padding) for x in (a, b)]
        if geometry[0] != geometry[1]:
            return Refusal("Transposed convolutions are added only where all their sizes agree.")
    else:
        # A layer in g groups is one in any divisor of g with zeros between them; the greatest
        # divisor of both has the fewest zeros.
        groups = gcd(a.groups, b.groups)
        grid = [_grid(*sizes) for sizes in zip(*_places(a), *_places(b), strict=True)]
        if None in grid:
            return Refusal("The taps of the two kernels do not lie on one grid.")
        places = [place for place in grid if place is not None]
        elements = a.channels_out * (a.channels_in // groups) * prod(size for size, *_ in places)
        refusal = _too_large(elements, a, b)
        if refusal is not None:
            return refusal
        a, b = regrouped(a, groups), regrouped(b, groups)
        a, b = _on_grid(a, places), _on_grid(b, places)
    bias = None if a.bias is None and b.bias is None else _bias(a) + _bias(b)
    return replace(a, weight=a.weight + b.weight, bias=bias)


def as_layer(affine: Affine | None, like: Layer) -> Layer | Refusal:
    """Return the affine (None: the identity) as a layer that can be added to `like`.

    W = diag(s), a 1×1 convolution with one group per channel; for a linear layer `[out, in]`.
    """
    channels = like.channels_in
    affine = affine or Affine(torch.ones(1).double(), torch.zeros(1).double())
    if channels != like.channels_out or _misfit(affine, channels):
        return Refusal("An identity needs as many output channels as there are input channels.")
    if like.transposed or any(stride != 1 for stride in like.stride):
        return Refusal("The identity has a value for each place, the convolution has not.")
    ones = (1,) * len(like.kernel)
    scale = affine.scale.expand(channels)
    bias = affine.shift.expand(channels).clone() if affine.shifts else None
    if not ones:
        return Layer(torch.diag(scale), bias)
    weight = scale.reshape(channels, 1, *ones).clone()
    return Layer(weight, bias, ones, (0,) * len(ones), ones, channels)


def average_pool(
    channels: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    divisor: int | None = None,
) -> Layer:
    """Return the average pool that counts its padding as zeros: W = 1/∏kernel, per channel."""
    weight = torch.full((channels, 1, *kernel), 1 / (divisor or prod(kernel)), dtype=torch.float64)
    return Layer(weight, None, stride, padding, (1,) * len(kernel), channels)


def padded(
    layer: Layer, begin: tuple[int, ...], end: tuple[int, ...] | None = None
) -> Layer | Refusal:
    """Return the convolution that pads its input further, with zeros on both sides.

    `end` (None: as `begin`) is how many come after the last place. Where they are fewer or more,
    the kernel has zeros for what its own padding, the same on both sides, is too much.
    """
    end = begin if end is None else end
    if layer.transposed or not len(begin) == len(end) == len(layer.kernel):
        return Refusal("Only a convolution pads its input.")
    padding: list[int] = []
    around: list[int] = []  # as torch's pad takes it: last dimension first, before and after
    for own, a, b, dilation in zip(layer.padding, begin, end, layer.dilation, strict=True):
        most = max(a, b)
        if (most - a) % dilation or (most - b) % dilation:
            return Refusal("What one side is padded more is no multiple of the dilation.")
        padding.append(own + most)
        around = [(most - a) // dilation, (most - b) // dilation, *around]
    weight = torch.nn.functional.pad(layer.weight, around) if any(around) else layer.weight
    return replace(layer, weight=weight, padding=tuple(padding))


def trimmed(layer: Layer) -> tuple[Layer, tuple[int, ...], tuple[int, ...]]:
    """Return the convolution without the outermost taps that are zero and lie in its padding.

    With it, per axis, how many zeros are to come before and after its input besides its padding.
    """
    weight, padding = layer.weight, []
    begin: list[int] = []
    end: list[int] = []
    for axis, (own, dilation) in enumerate(zip(layer.padding, layer.dilation, strict=True), 2):
        size = weight.shape[axis]
        used = weight.movedim(axis, 0).flatten(1).any(1).nonzero().flatten().tolist() or [0]
        # Only taps in the padding may go: one further in also decides how many places there are.
        first = min(used[0], own // dilation)
        last = max(used[-1], size - 1 - own // dilation)
        weight = weight.narrow(axis, first, last - first + 1)
        a, b = own - first * dilation, own - (size - 1 - last) * dilation
        padding.append(min(a, b))
        begin.append(a - padding[-1])
        end.append(b - padding[-1])
    kept = replace(layer, weight=weight.contiguous(), padding=tuple(padding))
    return kept, tuple(begin), tuple(end)


def regrouped(layer: Layer, groups: int) -> Layer:
    """Return the layer written with fewer groups, a divisor of its own, and zeros between them."""
    if groups == layer.groups:
        return layer
    assert layer.groups % groups == 0
    assert not layer.transposed
    inside = layer.groups // groups  # old groups in a new one
    out, width = layer.channels_out // layer.groups, layer.weight.shape[1]
    old = layer.weight.reshape(groups, inside, out, width, *layer.kernel)
    new = old.new_zeros(groups, inside, out, inside, width, *layer.kernel)
    for index in range(inside):
        new[:, index, :, index] = old[:, index]
    return replace(
        layer,
        weight=new.reshape(layer.channels_out, inside * width, *layer.kernel),
        groups=groups,
    )


def _too_large(elements: int, a: Layer, b: Layer) -> Refusal | None:
    before = a.weight.numel() + b.weight.numel()
    if elements <= max(_LARGE, _MUCH * before):
        return None
    return Refusal(f"Merged, the weight would have {elements:,} elements in place of {before:,}.")


def _tap(weight: Tensor, at: tuple[int, ...]) -> Tensor:
    """Return the part of a weight that is at one place of the kernel, its last dimensions."""
    for index in reversed(at):
        weight = weight.select(-1, index)
    return weight


def _misfit(affine: Affine, channels: int) -> bool:
    return any(tensor.numel() not in (1, channels) for tensor in (affine.scale, affine.shift))


def _bias(layer: Layer) -> Tensor:
    return layer.weight.new_zeros(layer.channels_out) if layer.bias is None else layer.bias


def _sizes(layer: Layer) -> tuple[tuple[int, ...], ...]:
    return layer.kernel, layer.stride, layer.padding


def _places(layer: Layer) -> tuple[tuple[int, ...], ...]:
    return layer.kernel, layer.padding, layer.dilation


def _grid(ka: int, pa: int, da: int, kb: int, pb: int, db: int) -> tuple[int, int, int] | None:
    """Kernel size, padding and dilation that hold the taps of two kernels; None: they do not fit.

    The taps of a kernel lie at −p, −p + d, …; of one tap, d does not matter.
    """
    dilation = db if ka == 1 else da
    if kb > 1 and db != dilation:
        return None
    padding = max(pa, pb)
    if (padding - pa) % dilation or (padding - pb) % dilation:
        return None
    size = max((padding - pa) // dilation + ka, (padding - pb) // dilation + kb)
    return size, padding, dilation


def _on_grid(layer: Layer, places: list[tuple[int, int, int]]) -> Layer:
    around: list[int] = []  # as torch's pad takes it: last dimension first, before and after
    for (size, padding, dilation), k, p in zip(places, layer.kernel, layer.padding, strict=True):
        first = (padding - p) // dilation
        around = [first, size - first - k, *around]
    return replace(
        layer,
        weight=torch.nn.functional.pad(layer.weight, around) if around else layer.weight,
        padding=tuple(padding for _, padding, _ in places),
        dilation=tuple(dilation for _, _, dilation in places),
    )


def _along_out(layer: Layer, values: Tensor) -> Tensor:
    """Return the weight times a value per output channel."""
    ones = [1] * (layer.weight.dim() - 2)
    if not layer.transposed:
        return layer.weight * values.reshape(-1, 1, *ones)
    return layer.weight * _per_group(values, layer.groups, layer.weight.shape[0], ones)


def _along_in(layer: Layer, values: Tensor) -> Tensor:
    """Return the weight times a value per input channel."""
    ones = [1] * (layer.weight.dim() - 2)
    if layer.transposed:
        return layer.weight * values.reshape(-1, 1, *ones)
    return layer.weight * _per_group(values, layer.groups, layer.weight.shape[0], ones)


def _per_group(values: Tensor, groups: int, rows: int, ones: list[int]) -> Tensor:
    """Return `[rows, values/groups, 1, …]`: each block of rows has the values of its group."""
    return values.reshape(groups, -1, *ones).repeat_interleave(rows // groups, 0)
