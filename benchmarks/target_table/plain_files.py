"""What each runtime's own documentation makes of a model, loaded on one thread."""

import contextlib
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.targets.executorch.program import ExecutorchModel
from torchfuse.targets.onnx.session import OnnxModel
from torchfuse.targets.openvino.compiled_model import OpenVinoModel

__all__ = ["frozen", "plain"]

Data = Sequence[Tensor] | None  # to quantize with; None: float32


def _pte(model: nn.Module, x: Tensor, data: Data) -> Callable[..., Any]:
    """ExecuTorch's tutorials: XnnpackPartitioner, XNNPACKQuantizer."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    exported = torch.export.export(model, (x,))
    if data is not None:
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )

        quantizer = XNNPACKQuantizer()
        quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))
        exported = torch.export.export(_quantized(exported, quantizer, data), (x,))
    edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    return ExecutorchModel(bytes(edge.to_executorch().buffer))


def _quantized(
    exported: torch.export.ExportedProgram, quantizer: Any, data: Sequence[Tensor]
) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(exported.module(), quantizer)
    for sample in data:
        prepared(sample)
    converted: nn.Module = convert_pt2e(prepared)
    return converted


def _onnx(model: nn.Module, x: Tensor, data: Data) -> Callable[..., Any]:
    """torch.onnx.export, and ONNX Runtime's quantize_static (QDQ, per channel)."""
    with tempfile.TemporaryDirectory() as folder:
        path, quantized = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, external_data=False)
        if data is None:
            return OnnxModel(path.read_bytes(), threads=1)
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        quant_pre_process(path, path)
        name = onnx.load(path).graph.input[0].name

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self._left = iter(data)

            def get_next(self) -> Any:
                sample = next(self._left, None)
                return None if sample is None else {name: sample.numpy()}

        quantize_static(path, quantized, Reader(), per_channel=True)
        return OnnxModel(quantized.read_bytes(), threads=1)


def _xml(model: nn.Module, x: Tensor, data: Data) -> Callable[..., Any]:
    """OpenVINO's convert_model with f32 asked for, and nncf.quantize, told of transformers."""
    import nncf
    import openvino

    converted = openvino.convert_model(model, example_input=x, input=[tuple(x.shape)])
    if data is not None:
        samples = nncf.Dataset([sample.numpy() for sample in data])
        is_transformer = "Transformer" in type(model).__name__
        kind = nncf.ModelType.TRANSFORMER if is_transformer else None
        converted = nncf.quantize(converted, samples, subset_size=len(data), model_type=kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plain.xml"
        openvino.save_model(converted, path, compress_to_fp16=False)
        return OpenVinoModel(path.read_bytes(), path.with_suffix(".bin").read_bytes(), threads=1)


def _aoti(model: nn.Module, x: Tensor, data: Data) -> Callable[..., Any]:
    """aoti_compile_and_package; int8 by X86InductorQuantizer, which asks for freezing."""
    exported = torch.export.export(model, (x,))
    options = {}
    if data is not None:
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        exported = torch.export.export(_quantized(exported, quantizer, data), (x,))
        options = {"freezing": True}
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(
            exported, package_path=f"{folder}/plain.pt2", inductor_configs=options
        )
        package: Callable[..., Any] = torch._inductor.aoti_load_package(path)
        return package


_MADE_BY = {".pte": _pte, ".onnx": _onnx, ".xml": _xml, ".aoti.pt2": _aoti}


def plain(suffix: str, model: nn.Module, x: Tensor, data: Data) -> Callable[..., Any]:
    """Return the model as the runtime of `suffix` runs it; in int8 if there is data."""
    with known_warnings_ignored(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        return _MADE_BY[suffix](model, x, data)


def frozen(model: nn.Module, x: Tensor) -> Callable[..., Any]:
    """Return the model by torch.compile, frozen."""
    with known_warnings_ignored(), torch.no_grad():
        compiled: Callable[..., Any] = torch.compile(model, options={"freezing": True})
        compiled(x)
    return compiled
