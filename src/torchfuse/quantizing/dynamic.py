"""Int8 and int4 weights with activations quantized as they come: no calibration data."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx, nn

from torchfuse.errors import UnsupportedError
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.lowering.capture import capture
from torchfuse.quantizing.static import keep_integers
from torchfuse.verifying.outputs import copy_tensors

if TYPE_CHECKING:
    from torchfuse.cases import Case

__all__ = ["GROUP_SIZE", "DynamicallyQuantized", "quantized"]

GROUP_SIZE = 32  # inputs that share a scale in int4: what XNNPACK's kernels take


class DynamicallyQuantized(NamedTuple):
    """A model with quantized linear layers, and the float graph that it is compared with."""

    model: fx.GraphModule
    reference: fx.GraphModule


def quantized(
    model: nn.Module, example: Case, scheme: str, dynamic_shapes: Any
) -> DynamicallyQuantized:
    """Return `model` with its linear layers in "int8_dynamic" or "int4".

    Raises:
        UnsupportedError: there is no linear layer that can be quantized so, or torch.export cannot
            capture the model.
    """
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise UnsupportedError(
            f"{scheme} is for linear layers, of which this model has none; use static int8."
        )
    if scheme == "int4":
        return DynamicallyQuantized(
            _graph(_int4(model), example, dynamic_shapes), _graph(model, example, dynamic_shapes)
        )
    reference = _graph(model, example, dynamic_shapes)
    return DynamicallyQuantized(_int8(copy.deepcopy(reference), example), reference)


def _graph(model: nn.Module, example: Case, dynamic_shapes: Any) -> fx.GraphModule:
    graph: fx.GraphModule = capture(model, example, dynamic_shapes).module(check_guards=False)
    keep_integers(graph)
    return graph


def _int8(graph: fx.GraphModule, example: Case) -> fx.GraphModule:
    with known_warnings_ignored():
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
        quantizer = XNNPACKQuantizer().set_operator_type(torch.ops.aten.linear.default, config)
        prepared = prepare_pt2e(graph, quantizer)
        args, kwargs = copy_tensors((example.args, dict(example.kwargs)))
        with torch.no_grad():
            prepared(*args, **kwargs)  # the weights' observers see them when they are used
        converted: fx.GraphModule = convert_pt2e(prepared)
    return converted


def _int4(model: nn.Module) -> nn.Module:
    with known_warnings_ignored():
        from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
        from torchao.quantization.granularity import PerGroup

    def fits(module: nn.Module, _: str) -> bool:
        return isinstance(module, nn.Linear) and module.in_features % GROUP_SIZE == 0

    if not any(fits(module, "") for module in model.modules()):
        raise UnsupportedError(
            f"int4 takes linear layers with a multiple of {GROUP_SIZE} inputs, of which this model "
            "has none; use int8_dynamic."
        )
    changed = copy.deepcopy(model)
    with known_warnings_ignored():
        quantize_(
            changed,
            Int8DynamicActivationIntxWeightConfig(
                weight_dtype=torch.int4,  # type: ignore[attr-defined]
                weight_granularity=PerGroup(GROUP_SIZE),
            ),
            fits,
        )
    return changed
