"""Weights rounded so that the layer's output stays, and biases that take up what is left.

Layer by layer, in running order, each given what the layers before it put out in int8:

    min over int8 Q of ‖(W − s·Q) · X‖²     X: the layer's inputs on the calibration data
    b' = mean(Y) − s·Q · mean(X)            Y: what the layer puts out in float

The first is solved one column at a time, each column's rounding error taken up by those after it
(Frantar et al., Optimal Brain Compression, 2022); the scales stay as they are. The second alone is
bias correction (Nagel et al., 2019). Both change constants only: nothing is slower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from torchfuse.quantizing.layerwise import Step, attribute, paired_steps, set_attribute
from torchfuse.quantizing.static import group_count

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torchfuse.cases import Case

__all__ = ["correct"]

aten = torch.ops.aten

_LAYERS = (aten.conv1d.default, aten.conv2d.default, aten.linear.default)
_COLUMNS = 300  # of each case's inputs (one per output position) that are looked at
_DAMPING = 0.05  # of the mean diagonal: few samples say little of columns that go together
_INT8_LARGEST = 127


def correct(
    quantized: fx.GraphModule, reference: fx.GraphModule, data: Sequence[Case], *, rounding: bool
) -> int:
    """Correct the biases of an int8 graph in place, with `rounding` its weights; return how many.

    `reference` is the float graph that it was made from: its layers have the same names.
    """
    generator = torch.Generator().manual_seed(0)
    corrected = 0
    for expected, step in paired_steps(reference, quantized, data, _LAYERS):
        parameters = _int8_parameters(step.node)
        if parameters is None:
            continue
        weight = expected.node.args[1]
        assert isinstance(weight, fx.Node)
        _correct_layer(
            quantized,
            step,
            parameters,
            _Given(attribute(reference, weight.target), step.inputs, expected.outputs),
            rounding=rounding,
            generator=generator,
        )
        corrected += 1
    return corrected


def _int8_parameters(node: fx.Node) -> _Parameters | None:
    """The int8 values of the layer's weight, their scales and its bias; None: not int8."""
    dequantized = node.args[1]
    bias = node.args[2] if len(node.args) > 2 else None
    if not isinstance(dequantized, fx.Node) or not isinstance(bias, fx.Node):
        return None
    if "dequantize_per_channel" not in str(dequantized.target) or bias.op != "get_attr":
        return None
    values, scales = dequantized.args[:2]
    if len(bias.users) > 1 or not isinstance(values, fx.Node) or not isinstance(scales, fx.Node):
        return None
    return _Parameters(values, scales, bias)


class _Parameters(NamedTuple):
    """Constants of an int8 layer."""

    values: fx.Node
    scales: fx.Node
    bias: fx.Node


class _Given(NamedTuple):
    """What a layer is given in int8, and what it has and puts out in float."""

    weight: Tensor
    inputs: list[Tensor]
    outputs: list[Tensor]


def _correct_layer(
    graph: fx.GraphModule,
    step: Step,
    parameters: _Parameters,
    given: _Given,
    *,
    rounding: bool,
    generator: torch.Generator,
) -> None:
    stored, scales, bias = parameters
    int8 = attribute(graph, stored.target)
    groups = group_count(step.node)
    mean_x, mean_y, covariance = _moments(step.node, given, groups, generator, rounding=rounding)
    scale = attribute(graph, scales.target).double().reshape(groups, -1, 1)
    rows = int8.double().reshape(groups, -1, mean_x.shape[1])
    if covariance is not None:
        float_rows = given.weight.double().reshape(rows.shape)
        rows = torch.stack(
            [_rounded(*group) for group in zip(float_rows, covariance, scale, strict=True)]
        )
        set_attribute(graph, stored.target, rows.reshape(int8.shape))
    set_attribute(graph, bias.target, (mean_y - rows * scale @ mean_x).flatten())
    step.run_again()


def _moments(
    node: fx.Node, given: _Given, groups: int, generator: torch.Generator, *, rounding: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Means of inputs and outputs, `[groups, n, 1]`, and the inputs' covariance if rounding."""
    count = 0
    mean_x = mean_y = scatter = torch.zeros((), dtype=torch.float64)
    for x, y in _columns(node, given, groups, generator):
        count += x.shape[2]
        share = x.shape[2] / count
        case_x, case_y = x.mean(2, keepdim=True), y.mean(2, keepdim=True)
        away = case_x - mean_x
        if rounding:  # around the means: a difference of large sums may be no covariance any more
            centred = x - case_x
            scatter = scatter + centred @ centred.transpose(1, 2)
            scatter = scatter + away @ away.transpose(1, 2) * (x.shape[2] * (1 - share))
        mean_x, mean_y = mean_x + share * away, mean_y + share * (case_y - mean_y)
    return mean_x, mean_y, scatter / count if rounding else None


def _columns(
    node: fx.Node, given: _Given, groups: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each case's inputs `[groups, in/groups × kernel, n]` and outputs `[groups, …, n]`."""
    for x, y in zip(given.inputs, given.outputs, strict=True):
        if node.target is aten.linear.default:
            columns, made = x.reshape(-1, x.shape[-1]).T, y.reshape(-1, y.shape[-1]).T
        else:
            columns, made = _unfolded(node, x, given.weight), y.transpose(0, 1).flatten(1)
        chosen = torch.randperm(columns.shape[1], generator=generator)[: _COLUMNS * x.shape[0]]
        columns, made = columns[:, chosen].double(), made[:, chosen].double()
        yield columns.reshape(groups, -1, len(chosen)), made.reshape(groups, -1, len(chosen))


def _unfolded(node: fx.Node, x: Tensor, weight: Tensor) -> Tensor:
    """What each output position of a conv reads: `[in × kernel, N × positions]`."""
    kernel = tuple(weight.shape[2:])
    stride, padding, dilation = (
        _per_dimension(node, position, default, len(kernel))
        for position, default in ((3, 1), (4, 0), (5, 1))
    )
    if x.dim() == 3:  # conv1d: an image of one row
        x, kernel = x.unsqueeze(2), (1, *kernel)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    unfolded = F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride)
    return unfolded.transpose(0, 1).flatten(1)


def _per_dimension(node: fx.Node, position: int, default: int, dims: int) -> tuple[int, ...]:
    given: Any = node.args[position] if len(node.args) > position else [default]
    return tuple(given) if len(given) == dims else tuple(given) * dims


def _rounded(weight: Tensor, covariance: Tensor, scale: Tensor) -> Tensor:
    """`[rows, columns]` in −127…127 for float `weight`; `scale` is `[rows, 1]`."""
    size = weight.shape[1]
    damping = covariance.diagonal().mean() * _DAMPING + torch.finfo(torch.float32).tiny
    hessian = covariance + damping * torch.eye(size, dtype=torch.float64)
    order = hessian.diagonal().argsort(descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    left = weight[:, order].clone()
    rounded = torch.zeros_like(left)
    for column in range(size):
        value = (left[:, column] / scale[:, 0]).round().clamp(-_INT8_LARGEST, _INT8_LARGEST)
        rounded[:, column] = value
        error = (left[:, column] - value * scale[:, 0]) / upper[column, column]
        left[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
    result = torch.zeros_like(rounded)
    result[:, order] = rounded
    return result
