"""How far each layer of an int8 graph is from the float one, and what is likely to blame.

Both graphs run side by side, layer by layer, over all calibration data at once: one pass. A layer's
own share is measured by giving the int8 layer what the float one is given.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from torchfuse.quantizing.lockstep import attribute, steps
from torchfuse.quantizing.report import LayerError
from torchfuse.quantizing.static import LAYERS, module_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torchfuse.inputs import Case
    from torchfuse.quantizing.lockstep import Step

__all__ = ["errors_by_node", "layer_errors", "sqnr_db"]

# Beyond these a cause is named. An int8 tensor has 8 bits over its whole range: where the 99.9th
# percentile is a fourth of the largest value, 2 of them are spent on one value in a thousand.
_OUTLIER = 4.0
_IMBALANCE = 16.0
_FEW_SAMPLES = 32
_QUANTILE = 0.999
_MOST_VALUES = 1_000_000  # torch.quantile takes no more than 16 million
_LOW_DB = 30.0  # a layer better than this needs no explanation


def sqnr_db(signal: float, noise: float) -> float:
    """Return 10 · log10(signal / noise), both sums of squares; inf where nothing differs."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def layer_errors(
    quantized: fx.GraphModule, reference: fx.GraphModule, data: Sequence[Case]
) -> tuple[LayerError, ...]:
    """Return the error of each layer that both graphs have, the worst first."""
    errors = [error for _, error in errors_by_node(quantized, reference, data)]
    return tuple(sorted(errors, key=lambda error: error.sqnr_db))


def errors_by_node(
    quantized: fx.GraphModule, reference: fx.GraphModule, data: Sequence[Case]
) -> Iterator[tuple[str, LayerError]]:
    """Yield the layers' nodes by name, each with its error, in running order."""
    floats = _layers(reference, data)
    for step, _ in _layers(quantized, data):
        expected, given = next(floats)
        if expected.node.name != step.node.name:
            raise AssertionError(f"{expected.node.name} and {step.node.name} are no pair")
        source = expected.node.args[0]
        assert isinstance(source, fx.Node)
        inputs = given[source]
        own = _own_outputs(quantized, step.node, inputs)
        total = _noise(expected.values, step.values)
        yield (
            step.node.name,
            LayerError(
                module=module_path(step.node),
                operator=LAYERS[step.node.target],  # type: ignore[index]
                sqnr_db=total,
                own_sqnr_db=None if own is None else _noise(expected.values, own),
                cause=_cause(expected, inputs, total),
            ),
        )


def _layers(
    graph: fx.GraphModule, data: Sequence[Case]
) -> Iterator[tuple[Step, dict[fx.Node, list[Any]]]]:
    return (entry for entry in steps(graph, data) if entry[0].node.target in LAYERS)


def _noise(expected: list[Tensor], got: list[Tensor]) -> float:
    signal = sum(float(a.double().square().sum()) for a in expected)
    noise = sum(
        float((a.double() - b.double()).square().sum()) for a, b in zip(expected, got, strict=True)
    )
    return sqnr_db(signal, noise)


def _own_outputs(graph: fx.GraphModule, node: fx.Node, inputs: list[Tensor]) -> list[Tensor] | None:
    """What the int8 layer makes of float inputs, quantized as it quantizes its own."""
    dequantized = node.args[0]
    if not isinstance(dequantized, fx.Node) or "dequantize" not in str(dequantized.target):
        return None
    quantizing = dequantized.args[0]
    if not isinstance(quantizing, fx.Node) or "quantize_per_tensor" not in str(quantizing.target):
        return None
    if any(isinstance(argument, fx.Node) for argument in quantizing.args[1:]):
        return None  # by the range of each input
    made = []
    for value in inputs:
        assert callable(quantizing.target)
        assert callable(dequantized.target)
        assert callable(node.target)
        int8 = quantizing.target(value, *quantizing.args[1:])
        x = dequantized.target(int8, *dequantized.args[1:], **dequantized.kwargs)
        made.append(node.target(x, *[_value(graph, arg) for arg in node.args[1:]]))
    return made


def _value(graph: fx.GraphModule, argument: Any) -> Any:
    """An argument that is a constant, or computed from constants only."""
    if not isinstance(argument, fx.Node):
        return argument
    if argument.op == "get_attr":
        return attribute(graph, argument.target)
    assert callable(argument.target)
    return argument.target(*[_value(graph, arg) for arg in argument.args], **argument.kwargs)


def _cause(step: Step, inputs: list[Tensor], total_db: float) -> str:
    if total_db > _LOW_DB:
        return ""
    causes = []
    if (tail := _tail(inputs)) > _OUTLIER:
        causes.append(f"outliers: its largest input is {tail:.0f}× the 99.9th percentile")
    groups = step.node.args[6] if len(step.node.args) > 6 else 1
    if isinstance(groups, int) and groups > 1 and (ratio := _imbalance(inputs)) > _IMBALANCE:
        causes.append(f"unbalanced channels: one range is {ratio:.0f}× the median channel's")
    if sum(value.shape[0] for value in inputs) < _FEW_SAMPLES:
        count = sum(value.shape[0] for value in inputs)
        causes.append(f"few samples: {count}, where some dozens are needed")
    return "; ".join(causes)


def _tail(inputs: list[Tensor]) -> float:
    step = max(1, sum(value.numel() for value in inputs) // _MOST_VALUES)
    values = torch.cat([value.flatten()[::step].abs() for value in inputs]).float()
    bulk = float(torch.quantile(values, _QUANTILE))
    largest = max(float(value.abs().max()) for value in inputs)
    return largest / bulk if bulk > 0 else 1.0


def _imbalance(inputs: list[Tensor]) -> float:
    ranges = torch.stack([v.transpose(0, 1).flatten(1).abs().amax(1) for v in inputs]).amax(0)
    middle = float(ranges.median())
    return float(ranges.max()) / middle if middle > 0 else math.inf
