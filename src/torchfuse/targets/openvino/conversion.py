"""Making an OpenVINO model: converted from the exported program, in int8 by one of two ways.

A model in float becomes int8 by NNCF, OpenVINO's own quantizer. What `torchfuse.quantize` returned
keeps the scales and the weights that were found for it: OpenVINO cannot convert PT2E's graph, but
it reads its QDQ form in ONNX.
"""

import contextlib
import dataclasses
import io
import logging
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from torchfuse.cases import Case
from torchfuse.errors import ArtifactError, UnsupportedError, first_line
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.lowering.capture import require_tensor_outputs, signature_of
from torchfuse.targets.calling import ANY_SIZE
from torchfuse.targets.captured import captured, nested_as
from torchfuse.targets.onnx.onnx_file import model_of
from torchfuse.targets.openvino.compiled_model import OpenVinoModel
from torchfuse.targets.target import Made, Request

if TYPE_CHECKING:
    from torchfuse.artifacts import Precision

__all__ = ["made"]


def made(request: Request) -> Made:
    """Return the model as OpenVINO's two files, compiled here.

    Raises:
        InputError: the model is in another precision than was asked for.
        UnsupportedError: OpenVINO cannot convert it, or this CPU does not compute in the precision.
    """
    found = captured(
        dataclasses.replace(request, precision=None),  # what is given is quantized, or in float
        suffix=".xml",
        lacking="OpenVINO has few kernels",
        precisions=("fp32", "int8"),
        for_xnnpack=False,
    )
    require_tensor_outputs(found.program, ".xml")
    signature = signature_of(found.program)
    precision: Precision = found.precision
    with _silence():
        model = _converted(found.program, quantized=precision == "int8")
        _set_shapes(model, signature)
        if request.precision == "int8" and precision != "int8":
            model = _quantized(model, request.calibration or [])
        precision = request.precision or precision
        files = _files(model, halved=precision == "fp16")
    try:
        loaded = OpenVinoModel(
            files[".xml"], files[".bin"], signature, precision=precision, threads=1
        )
    except ArtifactError as error:
        raise UnsupportedError(
            f"OpenVINO does not run the {precision} model here: {error}."
        ) from error
    if precision != "int8" and loaded.precision != precision:
        raise UnsupportedError(
            f"OpenVINO computes in {loaded.precision} on this CPU where {precision} was asked for; "
            f"ask for {loaded.precision}."
        )
    return Made(
        files=files,
        precision=precision,
        metadata={"signature": signature, "openvino": version("openvino")},
        run=nested_as(loaded, found.program.call_spec.out_spec),
        reference=found.reference,
        other_cases=found.other_cases,
        known=found.known,
        computes_in=loaded.precision,
    )


@contextlib.contextmanager
def _silence() -> Any:
    """Keep NNCF from drawing progress bars, and from saying what it found to quantize.

    OpenVINO's converter sets the level of the process's root logger, and leaves it where it fails.
    """
    import nncf

    level = logging.root.level
    with known_warnings_ignored(), contextlib.redirect_stdout(io.StringIO()):
        nncf.set_log_level(logging.ERROR)
        try:
            yield
        finally:
            logging.root.setLevel(level)


def _converted(program: torch.export.ExportedProgram, *, quantized: bool) -> Any:
    import openvino

    try:
        if quantized:
            data = model_of(program, precision="int8").SerializeToString()
            return openvino.Core().read_model(data)
        return openvino.convert_model(program)
    except UnsupportedError:
        raise
    except Exception as error:
        lines = [line for line in str(error).splitlines() if "No conversion rule" in line]
        reason = (lines or [first_line(error)])[0].strip().rstrip(".")
        raise UnsupportedError(
            f"OpenVINO cannot convert this model: {reason}; '.pt' has all operators, and "
            "'.pte' and '.onnx' have others; or replace it in the model."
        ) from error


def _set_shapes(model: Any, signature: dict[str, Any]) -> None:
    """Give the inputs the sizes that were declared; convert_model leaves them all open."""
    import openvino

    shapes = [sizes for sizes in signature["sizes"] if sizes is not None]
    if len(shapes) != len(model.inputs):
        raise UnsupportedError(
            f"OpenVINO takes {len(model.inputs)} of this model's {len(shapes)} tensors; leave out "
            "the inputs that it does not read, or use '.pte'."
        )
    model.reshape(
        {
            index: openvino.PartialShape(
                [
                    openvino.Dimension(low, -1 if high >= ANY_SIZE else high) if low < high else low
                    for low, high in sizes
                ]
            )
            for index, sizes in enumerate(shapes)
        }
    )


def _quantized(model: Any, data: Sequence[Case]) -> Any:
    import nncf

    samples = [[leaf.detach().numpy() for leaf in _tensors(case)] for case in data]
    kind = nncf.ModelType.TRANSFORMER if _has_attention(model) else None
    try:
        return nncf.quantize(
            model, nncf.Dataset(samples), subset_size=len(samples), model_type=kind
        )
    except Exception as error:
        raise UnsupportedError(
            f"NNCF cannot quantize this model: {first_line(error).rstrip('.')}; give what "
            "torchfuse.quantize returns."
        ) from error


def _has_attention(model: Any) -> bool:
    """Whether there is an attention, which NNCF has to be told of.

    Unasked it quantizes what is around the softmax, and its sums: ViT-Tiny has 6 dB by that, and
    21 dB otherwise, in less time.
    """
    kinds = {op.get_type_name() for op in model.get_ops()}
    return "ScaledDotProductAttention" in kinds or any(
        reader.get_node().get_type_name() == "MatMul"
        for op in model.get_ops()
        if op.get_type_name() == "Softmax"
        for reader in op.output(0).get_target_inputs()
    )


def _tensors(case: Case) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves((case.args, dict(case.kwargs)))
    return [leaf.contiguous() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _files(model: Any, *, halved: bool) -> dict[str, bytes]:
    """What OpenVINO saves; `halved`: with weights in fp16, which it computes in anyway."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=halved)
        return {suffix: path.with_suffix(suffix).read_bytes() for suffix in (".xml", ".bin")}
