"""How far each layer of an int8 graph is from the float one, and what is likely to blame.

Both graphs run side by side, layer by layer, on one sample after another: one pass. A layer's own
share is measured by giving the int8 layer what the float one is given.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from torchfuse.quantizing.importance import by_channel
from torchfuse.quantizing.layerwise import paired_steps
from torchfuse.quantizing.quantization_report import LayerError
from torchfuse.quantizing.static import LAYERS, group_count, module_path
from torchfuse.units import sqnr_db

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchfuse.cases import Case
    from torchfuse.quantizing.layerwise import Step

__all__ = ["SignalToNoise", "errors_by_node", "layer_errors", "sqnr_db"]

# Beyond these a cause is named. An int8 tensor has 8 bits over its whole range: where the 99.9th
# percentile is a fourth of the largest value, 2 of them are spent on one value in a thousand.
_OUTLIER = 4.0
_IMBALANCE = 16.0
_FEW_SAMPLES = 32
_QUANTILE = 0.999
_OCTAVES, _PER_OCTAVE = (-40, 40), 32  # of a histogram of |values|, whose bins are 2 % wide
_BINS = (_OCTAVES[1] - _OCTAVES[0]) * _PER_OCTAVE
_LOW_DB = 30.0  # a layer better than this needs no explanation


class SignalToNoise:
    """The power of a signal and of what is added to it, over all that is taken in."""

    def __init__(self) -> None:
        self._signal = self._noise = 0.0
        self._count = 0

    def take(self, expected: Tensor, got: Tensor) -> None:
        """Take in a tensor as it should be and as it is."""
        a = expected.double()
        self._signal += float(a.square().sum())
        self._noise += float((a - got.double()).square().sum())
        self._count += a.numel()

    @property
    def sqnr_db(self) -> float:
        """The ratio of both, in dB."""
        return sqnr_db(self._signal, self._noise)

    @property
    def rms_noise(self) -> float:
        """The root of the noise's mean square."""
        return math.sqrt(self._noise / self._count) if self._count else 0.0


def layer_errors(
    quantized: fx.GraphModule, reference: fx.GraphModule, data: Sequence[Case]
) -> tuple[LayerError, ...]:
    """Return the error of each layer that both graphs have, the worst first."""
    errors = errors_by_node(quantized, reference, data).values()
    return tuple(sorted(errors, key=lambda error: error.sqnr_db))


def without_few_samples(layers: Sequence[LayerError]) -> tuple[LayerError, ...]:
    """Return the layers without blaming few samples: the ranges had settled on them."""
    return tuple(
        replace(layer, cause="; ".join(c for c in layer.cause.split("; ") if _FEW not in c))
        for layer in layers
    )


_FEW = "few samples"


def errors_by_node(
    quantized: fx.GraphModule, reference: fx.GraphModule, data: Sequence[Case]
) -> dict[str, LayerError]:
    """Return the error of each layer by its node's name, in running order."""
    seen: dict[str, _Layer] = {}
    for case in data:
        for expected, step in paired_steps(reference, quantized, [case], LAYERS):
            layer = seen.setdefault(step.node.name, _Layer(step.node))
            layer.take(expected, step)
    return {name: layer.error() for name, layer in seen.items()}


class _Layer:
    """What a layer of both graphs gave, over all samples."""

    def __init__(self, node: fx.Node) -> None:
        self._node = node
        self._total = SignalToNoise()
        self._own: SignalToNoise | None = None  # None: it cannot be told from what it is given
        self._samples = 0
        self._values = 0
        # Of its float inputs; all of a fixed size, since what stays from each case, however small,
        # keeps the memory around it from being used again.
        self._histogram = torch.zeros(_BINS, dtype=torch.float64)  # of log2 |value|
        self._largest: Tensor | None = None  # |value| of each channel

    def take(self, expected: Step, step: Step) -> None:
        """Take in one case: what the float and the int8 layer were given and gave."""
        (x,), (wanted,), (got,) = expected.inputs, expected.outputs, step.outputs
        self._total.take(wanted, got)
        own = _own_output(step, x)
        if own is not None:
            self._own = self._own or SignalToNoise()
            self._own.take(wanted, own)
        self._samples += x.shape[0]
        self._values += x.numel()
        magnitudes = x.abs()
        largest = (
            by_channel(magnitudes).amax(1) if group_count(self._node) > 1 else magnitudes.max()
        )
        self._largest = torch.maximum(largest, largest if self._largest is None else self._largest)
        octaves = magnitudes.double().log2().clamp(max=_OCTAVES[1])
        self._histogram += torch.histc(octaves, _BINS, *_OCTAVES)

    def error(self) -> LayerError:
        """Return what int8 does to the layer, and why."""
        total_db = self._total.sqnr_db
        return LayerError(
            module=module_path(self._node),
            operator=LAYERS[self._node.target],  # type: ignore[index]
            sqnr_db=total_db,
            own_sqnr_db=None if self._own is None else self._own.sqnr_db,
            cause="" if total_db > _LOW_DB else self._cause(),
        )

    def _cause(self) -> str:
        causes = []
        assert self._largest is not None
        largest, bulk = float(self._largest.max()), self._quantile
        if largest > _OUTLIER * bulk > 0:
            causes.append(
                f"outliers: its largest input is {largest / bulk:.0f}× the 99.9th percentile"
            )
        if group_count(self._node) > 1 and (ratio := _imbalance(self._largest)) > _IMBALANCE:
            causes.append(f"unbalanced channels: one range is {ratio:.0f}× the median channel's")
        if self._samples < _FEW_SAMPLES:
            causes.append(f"{_FEW}: {self._samples}, where some dozens are needed")
        return "; ".join(causes)

    @property
    def _quantile(self) -> float:
        """Of all |values|, as near as the histogram tells; 0: next to all are nothing."""
        below = self._values - float(self._histogram.sum())
        wanted = _QUANTILE * self._values - below
        if wanted <= 0:
            return 0.0
        reached = int(torch.searchsorted(self._histogram.cumsum(0), wanted))
        return float(2.0 ** (_OCTAVES[0] + (reached + 0.5) / _PER_OCTAVE))


def _own_output(step: Step, x: Tensor) -> Tensor | None:
    """What the int8 layer makes of a float input, quantized as it quantizes its own."""
    dequantized = step.node.args[0]
    if not isinstance(dequantized, fx.Node) or "dequantize" not in str(dequantized.target):
        return None
    quantizing = dequantized.args[0]
    if not isinstance(quantizing, fx.Node) or "quantize_per_tensor" not in str(quantizing.target):
        return None
    if any(isinstance(argument, fx.Node) for argument in quantizing.args[1:]):
        return None  # by the range of each input
    assert callable(quantizing.target)
    assert callable(dequantized.target)
    int8 = quantizing.target(x, *quantizing.args[1:])
    given = dequantized.target(int8, *dequantized.args[1:], **dequantized.kwargs)
    (made,) = step.called_on([given])
    return made  # type: ignore[no-any-return]


def _imbalance(ranges: Tensor) -> float:
    middle = float(ranges.median())
    return float(ranges.max()) / middle if middle > 0 else math.inf
