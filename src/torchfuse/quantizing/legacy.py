"""Static int8 for TorchScript (`.pt`, `.ptl`): torch.ao's quantized modules and engines.

QuantStubs, DeQuantStubs and the wrapped additions and concatenations that torch.ao's eager mode
wants in the model's source are put in by its FX mode, which traces the model instead; what it
cannot trace is recorded as it runs.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import fx, nn

from torchfuse.errors import InputError, UnsupportedError, first_line
from torchfuse.fusing.model_fusing import fuse
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.quantizing.calibration import calibrate
from torchfuse.quantizing.static import QuantizedLayer

if TYPE_CHECKING:
    from torchfuse.cases import Case

__all__ = ["ENGINES", "LegacyInt8", "quantized"]

ENGINES = ("qnnpack", "x86", "fbgemm", "onednn")
_COMPUTING = ("conv", "linear", "matmul", "lstm", "gru", "rnn")


class LegacyInt8(NamedTuple):
    """A model in int8 for one of torch's engines."""

    model: fx.GraphModule
    layers: tuple[QuantizedLayer, ...]
    late_growth: float | None  # how late its ranges still grew
    notes: tuple[str, ...] = ()


def quantized(model: nn.Module, example: Case, data: list[Case], engine: str) -> LegacyInt8:
    """Return `model` in int8 for `engine`.

    The engine is torch's while this runs, and must be where the result runs.

    Raises:
        InputError: this build of torch does not have the engine.
        UnsupportedError: torch.fx cannot trace the model.
    """
    supported = torch.backends.quantized.supported_engines
    if engine not in supported:
        raise InputError(f"This torch has no engine '{engine}'; it has {', '.join(supported)}.")
    before = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = engine
        with known_warnings_ignored():
            return _quantized(copy.deepcopy(model), example, data, engine)
    finally:
        torch.backends.quantized.engine = before


def _quantized(model: nn.Module, example: Case, data: list[Case], engine: str) -> LegacyInt8:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    mapping = get_default_qconfig_mapping(engine)
    inputs = (*example.args, *example.kwargs.values())
    notes: tuple[str, ...] = ()
    try:
        prepared = prepare_fx(model.eval(), mapping, inputs)
    except Exception as error:  # noqa: BLE001  # the model's own code runs, with proxies
        reason = first_line(error)
        try:
            prepared = prepare_fx(_as_it_runs(model, example), mapping, inputs)
        except Exception as second:
            raise UnsupportedError(
                f"{type(model).__name__} cannot be traced, which quantizing for '{engine}' needs: "
                f"{first_line(second)}. Use backend='xnnpack' and '.pte', or put QuantStub and "
                "DeQuantStub into the model and use export(…, precision='int8')."
            ) from second
        notes = (
            f"torch.fx cannot trace {type(model).__name__} ({reason}), so it was recorded as it "
            "runs on the example inputs; control flow that depends on sizes is frozen.",
        )
    growth = calibrate(prepared, data)
    converted = convert_fx(prepared)
    return LegacyInt8(converted, tuple(_layers(converted)), growth, notes)


def _as_it_runs(model: nn.Module, example: Case) -> fx.GraphModule:
    """The model as torch's functions in the order they ran, batch norms folded before."""
    fused = fuse(model, example).model
    recorder = torch._dynamo.export(fused, aten_graph=False, assume_static_by_default=True)
    recorded: fx.GraphModule = recorder(*example.args, **example.kwargs).graph_module
    return recorded.eval()


def _layers(converted: fx.GraphModule) -> list[QuantizedLayer]:
    found = []
    modules = dict(converted.named_modules())
    for node in converted.graph.nodes:
        if node.op == "call_module":
            module = modules[str(node.target)]
            name = type(module).__name__.lower()
            if any(word in name for word in _COMPUTING):
                is_int8 = "quantized" in type(module).__module__
                found.append(QuantizedLayer(str(node.target), name, is_int8, _weights(module)))
        elif node.op == "call_function":
            name = str(getattr(node.target, "__name__", node.target))
            if any(word in name for word in _COMPUTING):
                found.append(QuantizedLayer("", name, "quantized" in str(node.target)))
    return found


def _weights(module: nn.Module) -> int:
    """How many numbers a layer's matrices hold; those of a quantized one are behind a method."""
    if "quantized" in type(module).__module__:
        weight = getattr(module, "weight", None)
        return int(weight().numel()) if callable(weight) else 0
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)
