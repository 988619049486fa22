"""Making a TorchScript file: quantized by torch.ao where asked, scripted, optimized for mobile."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from torchfuse.cases import Case
from torchfuse.errors import InputError, TorchfuseError, UnsupportedError
from torchfuse.fusing.model_fusing import fuse
from torchfuse.quantizing import is_quantized_graph
from torchfuse.quantizing.preconditions import has_quantized_modules
from torchfuse.targets.captured import weights_precision
from torchfuse.targets.target import Made, Request
from torchfuse.targets.torchscript import mobile_optimizer, scripting

if TYPE_CHECKING:
    from torchfuse.artifacts import Precision

__all__ = ["made"]

_TRACED = (  # as every note: what comes after "the file was"
    "traced, since scripting fails: {}; control flow that depends on data is frozen as it ran"
)


def made(request: Request) -> Made:
    """Return the model as a module that was saved and loaded here.

    Raises:
        InputError: the model is in another precision than was asked for.
        UnsupportedError: it can be neither scripted nor traced, or not quantized.
    """
    model, examples, form = request.model, request.examples, request.form
    if isinstance(model, fx.GraphModule) and is_quantized_graph(model.graph):
        raise UnsupportedError(
            f"A model that torchfuse.quantize made is for '.pte' and '.onnx'; for '.{form}' give "
            "the model itself, with QuantStub and DeQuantStub, and precision='int8' with "
            "calibration data."
        )
    if form == "ptl" and (named := [name for case in examples for name in case.kwargs]):
        raise UnsupportedError(
            f"The lite interpreter takes inputs by position only, got {named[0]} by name; give "
            "them in the order of forward's arguments, or use '.pt'."
        )
    # Batch norms are folded by the optimizer for mobile. In int8 they must be fused before, by
    # their owner's choice of modules, since QuantStubs are placed around them by hand too.
    reference = (
        model if request.calibration is None else scripting.quantize(model, request.calibration)
    )
    precision: Precision = (
        "int8"
        if has_quantized_modules(reference)
        else weights_precision(reference.parameters(), "the mobile interpreters have few kernels")
    )
    if request.precision not in (None, precision):
        raise InputError(
            f"Expected a model that can be saved in {request.precision}, got one in {precision}."
        )
    scripted = scripting.script(reference, examples[0])
    batch_norms = scripting.batch_norms(scripted.module)
    prepared = (mobile_optimizer.folded if request.optimize else mobile_optimizer.frozen)(
        scripted.module
    )
    if request.optimize and precision != "int8" and scripting.batch_norms(prepared):
        scripted, prepared = _fused_before(model, examples, scripted, prepared)
    payload = scripting.serialize(prepared, form)
    traced = scripted.traced_because
    without_data = mobile_optimizer.without_data(prepared)
    return Made(
        files={f".{form}": payload},
        precision=precision,
        metadata={},
        run=scripting.deserialize(payload, form),
        reference=reference,
        notes=(
            *(() if traced is None else (_TRACED.format(traced),)),
            *(() if without_data is None else (without_data,)),
        ),
        batch_norms=batch_norms,
        batch_norms_left=scripting.batch_norms(prepared),
    )


def _fused_before(
    model: nn.Module,
    examples: Sequence[Case],
    scripted: scripting.Scripted,
    optimized: torch.jit.ScriptModule,
) -> tuple[scripting.Scripted, torch.jit.ScriptModule]:
    """Return the model scripted and optimized, fused before that if this leaves fewer batch norms.

    The optimizer does not fold them into transposed convs, nor a second one in a row.
    """
    try:
        again = scripting.script(
            fuse(model, list(examples), keep_originals=False).model, examples[0]
        )
    except TorchfuseError:  # it cannot be recorded, copied or proved: then nothing is to be gained
        return scripted, optimized
    fused = mobile_optimizer.folded(again.module)
    is_scripted = again.traced_because is None or scripted.traced_because is not None
    if is_scripted and scripting.batch_norms(fused) < scripting.batch_norms(optimized):
        return again, fused
    return scripted, optimized
