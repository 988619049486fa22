"""Making a package: captured, in int8 quantized by inductor's own recipe, frozen, compiled."""

import dataclasses
import importlib.util
import tempfile
from pathlib import Path

import torch
from torch import nn

from torchfuse.errors import UnsupportedError, first_line
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.lowering.capture import capture, require_tensor_outputs, signature_of
from torchfuse.quantizing import calibrate
from torchfuse.quantizing.static import converted, float_graph
from torchfuse.targets.aotinductor.cpu import this_cpu
from torchfuse.targets.aotinductor.package import AotiModel
from torchfuse.targets.captured import captured, in_float, nested_as
from torchfuse.targets.target import Made, Request

__all__ = ["made"]

_OPTIONS = {
    "freezing": True,  # weights as constants: three times as fast
    "cpp.dynamic_threads": True,  # as many as torch has when it runs, and not when it was compiled
}


def made(request: Request) -> Made:
    """Return the model compiled, and loaded here.

    Raises:
        InputError: the model is in another precision than was asked for.
        UnsupportedError: it cannot be captured, quantized or compiled.
    """
    found = captured(
        dataclasses.replace(request, precision=None),
        suffix=".aoti.pt2",
        lacking="AOTInductor's CPU kernels are not checked here",
        precisions=("fp32",),
        for_xnnpack=False,
    )
    require_tensor_outputs(found.program, ".aoti.pt2")
    program, precision, reference = found.program, found.precision, found.reference
    if request.precision == "int8":
        precision = "int8"
        reference, program = _quantized(request)
    payload = _compiled(program)
    signature = signature_of(found.program)
    return Made(
        files={".aoti.pt2": payload},
        precision=precision,
        metadata={"signature": signature, "cpu": this_cpu()},
        run=nested_as(AotiModel(payload, signature), found.program.call_spec.out_spec),
        reference=reference,
        other_cases=found.other_cases,
        known=in_float(reference) if precision == "int8" else (),
    )


def _compiled(program: torch.export.ExportedProgram) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        try:
            with known_warnings_ignored(), torch.no_grad():
                torch._inductor.aoti_compile_and_package(
                    program, package_path=str(path), inductor_configs=_OPTIONS
                )
        except Exception as error:
            raise UnsupportedError(
                f"AOTInductor cannot compile this model: {first_line(error).rstrip('.')}; try "
                "'.pte' or '.onnx'."
            ) from error
        return path.read_bytes()


def _quantized(request: Request) -> tuple[nn.Module, torch.export.ExportedProgram]:
    """Return the model in int8 as inductor's kernels take it, and its program."""
    model, case, data = request.model, request.examples[0], request.calibration or []
    graph = float_graph(model, case, data, request.dynamic_shapes, for_xnnpack=False)
    if importlib.util.find_spec("torchao") is None:
        raise UnsupportedError(
            "int8 needs torchao, not installed here: pip install 'torchfuse[executorch]'."
        )
    with known_warnings_ignored():
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        try:
            observed = prepare_pt2e(graph, quantizer)
        except Exception as error:
            raise UnsupportedError(
                f"X86InductorQuantizer cannot take this model: {first_line(error).rstrip('.')}; "
                "try int8 as '.onnx' or '.xml'."
            ) from error
    calibrate(observed, data)
    int8 = converted(observed)
    return int8, capture(int8, case, request.dynamic_shapes, for_xnnpack=False)
