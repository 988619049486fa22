"""Making an ONNX model: torch's exporter on the exported program, int8 as ONNX Runtime likes it.

PT2E's int8 graph becomes QuantizeLinear and DequantizeLinear around float operators (QDQ), of which
ONNX Runtime makes its int8 kernels when it loads the file. On x86 it does so for uint8 activations
only: of MobileNetV2 in int8, 15 of 52 convolutions and all additions stay in float. So what is
quantized between two operators is written as uint8, 128 more with a zero point 128 higher, which is
the same number: (q + 128) − (z + 128) = q − z.
"""

import contextlib
import logging
import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import fx

from torchfuse.artifacts import Precision
from torchfuse.errors import ArtifactError, UnsupportedError, first_line
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.lowering.capture import input_shapes, require_tensor_outputs, signature_of
from torchfuse.targets.captured import captured, nested_as
from torchfuse.targets.onnx.session import OnnxModel
from torchfuse.targets.target import Made, Request

__all__ = ["made", "model_of"]

_LARGEST_BYTES = 2**31 - 1  # of a protocol buffer
_INT8_TO_UINT8 = 128
_OTHERS = "'.pt' has all operators, and '.pte' and '.xml' have others; or replace it in the model"


def made(request: Request) -> Made:
    """Return the model as an ONNX file that was checked and loaded.

    Raises:
        InputError: the model is in another precision than was asked for.
        UnsupportedError: ONNX has no form of it, or ONNX Runtime refuses it.
    """
    found = captured(
        request,
        suffix=".onnx",
        lacking="ONNX Runtime has few kernels",
        precisions=("fp32", "int8"),
        for_xnnpack=False,
    )
    require_tensor_outputs(found.program, ".onnx")
    import onnx

    model = model_of(found.program, found.precision, optimize=request.optimize)
    if (size := model.ByteSize()) > _LARGEST_BYTES:
        raise UnsupportedError(
            f"An '.onnx' of one file holds 2 GiB, and this model has {size / 2**30:.1f}; use "
            "'.pte', or int8."
        )
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise UnsupportedError(
            f"torch.onnx.export made an invalid model: {first_line(error)}; use '.pte'."
        ) from error
    payload = model.SerializeToString()
    signature = signature_of(found.program)
    try:
        loaded = OnnxModel(payload, signature, threads=1)
    except ArtifactError as error:
        raise UnsupportedError(
            f"ONNX Runtime does not run the {found.precision} model here: {error}."
        ) from error
    taken = len(model.graph.input)
    tensors = sum(shape is not None for shape in input_shapes(found.program))
    if taken != tensors:
        raise UnsupportedError(
            f"ONNX Runtime takes {taken} of this model's {tensors} tensors; leave out the inputs "
            "that it does not read, or use '.pte'."
        )
    norms = sum(node.op_type == "BatchNormalization" for node in model.graph.node)
    return Made(
        files={".onnx": payload},
        precision=found.precision,
        metadata={
            "signature": signature,
            "onnxruntime": version("onnxruntime"),
            "opset": model.opset_import[0].version,
        },
        run=nested_as(loaded, found.program.call_spec.out_spec),
        reference=found.reference,
        other_cases=found.other_cases,
        known=found.known,
        batch_norms=norms or None,
        batch_norms_left=norms or None,
    )


def model_of(
    program: torch.export.ExportedProgram, precision: Precision, *, optimize: bool = True
) -> Any:
    """Return the program as an onnx.ModelProto, without names of anybody's source files.

    Raises:
        UnsupportedError: ONNX has no form of it.
    """
    _subtract_from_floats(program.graph)
    model = _exported(program, optimize=optimize)
    _strip(model)
    if precision == "int8":
        _make_activations_unsigned(model)
    return model


@contextlib.contextmanager
def _without_news() -> Iterator[None]:
    """Keep the exporter from logging that torchvision is missing, of which nothing is used."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _exported(program: torch.export.ExportedProgram, *, optimize: bool) -> Any:
    try:
        with known_warnings_ignored(), torch.no_grad(), _without_news():
            exported = torch.onnx.export(
                program, (), None, dynamo=True, verbose=False, optimize=optimize
            )
    except Exception as error:
        raise UnsupportedError(f"ONNX cannot have this model: {_reason(error)}.") from error
    assert exported is not None
    return exported.model_proto


def _subtract_from_floats(graph: fx.Graph) -> None:
    """Write `number - integers` as `number + (-float(integers))`, in place.

    torch.onnx.export finds no operator for the former: pytorch#194381.
    """
    aten = torch.ops.aten
    for node in graph.find_nodes(op="call_function", target=aten.rsub.Scalar):
        source, number, *alpha = node.args
        made = node.meta["val"]
        if source.meta["val"].dtype == made.dtype or alpha not in ([], [1]):
            continue
        value = source
        with graph.inserting_before(node):
            for target, args in ((aten.to.dtype, (made.dtype,)), (aten.neg.default, ())):
                value = graph.call_function(target, (value, *args))
                value.meta = {**node.meta}
        node.target, node.args = aten.add.Scalar, (value, number)


def _strip(model: Any) -> None:
    """Take out what says where in whose source code each node comes from, in place."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        part.doc_string = ""
        del part.metadata_props[:]


def _reason(error: Exception) -> str:
    """Return what the exporter says, or the operator for which it has no form."""
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    for text in chain:
        if (found := re.search(r"No ONNX function found for .*?op='([\w.:]+)'", text)) is not None:
            return f"it has no form of {found[1]}; {_OTHERS}"
    return f"{first_line(Exception(chain[-1] or chain[0])).rstrip('.')}; {_OTHERS}"


def _make_activations_unsigned(model: Any) -> None:
    """Write what lies between a QuantizeLinear and its DequantizeLinears as uint8, in place."""
    from onnx import TensorProto, numpy_helper

    graph = model.graph
    constants = {constant.name: constant for constant in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {output.name for output in graph.output}
    added: dict[str, Any] = {}

    def shifted(name: str) -> str:
        fresh = f"{name}_uint8"
        if fresh not in added:
            values = numpy_helper.to_array(constants[name]).astype(np.int16) + _INT8_TO_UINT8
            added[fresh] = numpy_helper.from_array(values.astype(np.uint8), fresh)
        return fresh

    def is_int8(node: Any) -> bool:
        zero_point = constants.get(node.input[2]) if len(node.input) > 2 else None
        return zero_point is not None and zero_point.data_type == TensorProto.INT8

    changed = set()
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or node.output[0] in outputs:
            continue
        read_by = readers.get(node.output[0], [])
        pair = [node, *read_by]
        only_dequantized = all(each.op_type == "DequantizeLinear" for each in read_by)
        if only_dequantized and all(map(is_int8, pair)):
            for each in pair:
                each.input[2] = shifted(each.input[2])
            changed.add(node.output[0])
    graph.initializer.extend(added.values())
    kept = [info for info in graph.value_info if info.name not in changed]
    del graph.value_info[:]
    graph.value_info.extend(kept)
