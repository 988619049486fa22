"""The legacy mobile target: TorchScript for the full (`.pt`) and the lite interpreter (`.ptl`).

TorchScript and torch.ao's eager quantization are deprecated; whatever needs them is in this file
and in mobile_optimizer.py.
"""

import contextlib
import inspect
import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.ao import quantization as ao
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import quantized as nniq
from torch.jit.mobile import _load_for_lite_interpreter

from torchfuse.cases import Case
from torchfuse.errors import ArtifactError, UnsupportedError, first_line
from torchfuse.isolation.model_copy import copied
from torchfuse.isolation.snapshot import put_back
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.quantizing import calibrate
from torchfuse.targets.torchscript.mobile_optimizer import nodes
from torchfuse.verifying.outputs import copy_tensors, run

__all__ = [
    "Scripted",
    "batch_norms",
    "deserialize",
    "op_counts",
    "quantize",
    "script",
    "serialize",
]


@dataclass(frozen=True)
class Scripted:
    """A TorchScript module, and how it was made."""

    module: torch.jit.ScriptModule
    traced_because: str | None  # why scripting was no option; None: it was scripted


def quantize(model: nn.Module, calibration: list[Case], *, engine: str = "qnnpack") -> nn.Module:
    """Return `model` in static int8, by torch.ao: prepare, calibrate, convert.

    `model` is in eval mode, fused as wanted, with QuantStub and DeQuantStub where it enters and
    leaves int8. The engine decides the qconfig: uint8 activations from histograms, int8 weights.

    Raises:
        UnsupportedError: this build has no such engine, or the converted model cannot run.
    """
    if not any(isinstance(module, ao.QuantStub) for module in model.modules()):
        raise UnsupportedError(
            f"int8 by torch.ao needs a QuantStub where {type(model).__name__} enters int8 and a "
            "DeQuantStub where it leaves it, and there is no QuantStub; add them, or use '.pte'"
        )
    with _engine(engine), known_warnings_ignored():
        prepared = copied(model)
        prepared.qconfig = ao.get_default_qconfig(engine)
        ao.prepare(prepared, inplace=True)
        calibrate(prepared, calibration, buffers=dict(model.named_buffers(remove_duplicate=False)))
        converted: nn.Module = ao.convert(prepared, inplace=True)
        _make_scales_scalar(converted)
        try:
            run(converted, calibration[0])
        except (NotImplementedError, RuntimeError) as error:
            raise UnsupportedError(
                f"the int8 model cannot run ({first_line(error)}): every part that runs in "
                "int8 must lie between a QuantStub and a DeQuantStub, and additions and "
                "concatenations in between must be FloatFunctionals"
            ) from error
    return converted


def script(model: nn.Module, case: Case) -> Scripted:
    """Return `model` scripted; traced only where scripting fails or the scripted model cannot run.

    Raises:
        UnsupportedError: it can be neither scripted nor traced.
    """
    model = copied(model)
    _make_scales_scalar(model)
    with known_warnings_ignored(), torch.no_grad():
        try:
            scripted = torch.jit.script(model)
            run(scripted, case)
        except Exception as error:  # noqa: BLE001  # the compiler raises whatever it likes
            # The same each time; and some end where the place in the code would follow.
            reason = re.sub(r" at 0x[0-9a-f]+| at$", "", first_line(error))
        else:
            return Scripted(scripted, None)
        try:
            args, kwargs = copy_tensors((case.args, dict(case.kwargs)))
            call = inspect.signature(model.forward).bind(*args, **kwargs)
            if call.kwargs:
                raise TypeError(f"tracing takes no keyword-only arguments, {list(call.kwargs)}")
            before = copied(model)
            with warnings.catch_warnings():  # the caller is told that, and why, it was traced
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
                traced = torch.jit.trace(model, call.args)
            put_back(traced, dict(before.named_buffers(remove_duplicate=False)))
        except Exception as error:
            raise UnsupportedError(
                f"{type(model).__name__} can be neither scripted ({reason}) nor traced "
                f"({first_line(error)}); use a '.pte' instead"
            ) from error
    return Scripted(traced, reason)


def op_counts(module: torch.jit.ScriptModule) -> Counter[str]:
    """Return how often each operator stands in the graph of `forward`, nested blocks included."""
    return Counter(node.kind() for node in nodes(module.inlined_graph))


def batch_norms(module: torch.jit.ScriptModule) -> int:
    """Return how many batch norms stand in the graph of `forward`, quantized ones not counted."""
    return op_counts(module)["aten::batch_norm"]


def serialize(module: torch.jit.ScriptModule, form: str) -> bytes:
    """Return the bytes of a `.pt` or a `.ptl` file.

    To memory, not to a path: torch's own writer aborts the process when the disk is full.
    """
    with known_warnings_ignored():
        if form == "ptl":
            return bytes(module._save_to_buffer_for_lite_interpreter())
        buffer = io.BytesIO()
        torch.jit.save(module, buffer)
        return buffer.getvalue()


def deserialize(data: bytes, form: str, *, engine: str = "qnnpack") -> Callable[..., Any]:
    """Return the model in the bytes of a `.pt` or `.ptl` file, ready to be called.

    `engine` is the one quantized weights are packed for; it must be the one they were made with.
    """
    load: Callable[..., Any] = _load_for_lite_interpreter if form == "ptl" else torch.jit.load
    try:
        with known_warnings_ignored(), _engine(engine):
            _use_up_deprecation()
            module: Callable[..., Any] = load(io.BytesIO(data))
    except RuntimeError as error:
        raise ArtifactError(f"torch cannot load it as '.{form}': {first_line(error)}") from error
    return module


def _use_up_deprecation() -> None:
    """Have torch say once, where it can be silenced, that quantized tensors are deprecated.

    The loader says it from C++, straight to stderr, unless it was said before in this process.
    """
    torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.qint8)


def _make_scales_scalar(model: nn.Module) -> None:
    """Give quantized batch norms 0-d scales.

    torch registers them with one dimension, which eager takes and a scripted call refuses when it
    is run: "Cannot input a tensor of dimension other than 0 as a scalar argument".
    """
    for module in model.modules():
        if isinstance(module, nnq.BatchNorm2d | nnq.BatchNorm3d | nniq.BNReLU2d | nniq.BNReLU3d):
            for name in ("scale", "zero_point"):
                module.register_buffer(name, module.get_buffer(name).reshape(()))


@contextlib.contextmanager
def _engine(name: str) -> Iterator[None]:
    """Make `name` the engine that quantized weights are packed for."""
    supported = [
        engine for engine in torch.backends.quantized.supported_engines if engine != "none"
    ]
    if name not in supported:
        raise UnsupportedError(
            f"this build of torch has no quantized engine '{name}'; it has {', '.join(supported)}"
        )
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
