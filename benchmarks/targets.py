"""Files of torchfuse beside what each runtime's own documentation makes of the same models.

For each model, in fp32 and in int8: torchfuse's file for each target, and the plain file of each
runtime: ExecuTorch's XnnpackPartitioner (and XNNPACKQuantizer), torch.onnx.export (and ONNX
Runtime's quantize_static), OpenVINO's convert_model with f32 asked for (and nncf.quantize); eager
PyTorch beside them. One thread each, interleaved, medians; ratios with intervals.

    python benchmarks/targets.py [--json FILE] [--only NAME]... [--runs N] [--fp32 | --int8]
"""

import argparse
import contextlib
import functools
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchfuse
from torchfuse.inputs import Case
from torchfuse.quieting import quiet
from torchfuse.targets.calling import Model
from torchfuse.targets.executorch.program import ExecutorchModel
from torchfuse.targets.onnx.session import OnnxModel
from torchfuse.targets.openvino.compiled import OpenVinoModel
from torchfuse.timing import measure_interleaved, ratio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

SUFFIXES = (".pte", ".onnx", ".xml")


def models() -> dict[str, Callable[[], nn.Module]]:
    """Return the models by name; those of timm only where timm is installed."""
    from torchfuse.models.mobilenet_v2 import MobileNetV2
    from zoo.mobilenet_v3 import MobileNetV3
    from zoo.resnet import ResNet

    found: dict[str, Callable[[], nn.Module]] = {
        "mobilenet_v2": MobileNetV2,
        "mobilenet_v3": MobileNetV3,
        "resnet": ResNet,
    }
    with contextlib.suppress(ImportError, RuntimeError):
        import timm

        for name in (
            "resnet18", "mobilenetv3_small_100", "mnasnet_100", "regnetx_002", "repvgg_a0",
            "mobileone_s0", "convnext_femto", "vit_tiny_patch16_224",
        ):  # fmt: skip
            found[name] = functools.partial(timm.create_model, name)
    return found


def as_if_trained(model: nn.Module) -> nn.Module:
    """Return the model in eval mode, with other statistics and scales than a fresh one has."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):  # layer scale, 1e-6 at first, by which a branch is nothing
                parameter.uniform_(0.1, 0.5)
    return model.eval()


def plain_pte(model: nn.Module, x: torch.Tensor, data: list[torch.Tensor] | None) -> Model:
    """ExecuTorch's tutorial."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    exported = torch.export.export(model, (x,))
    if data is not None:
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        quantizer = XNNPACKQuantizer()
        quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))
        prepared = prepare_pt2e(exported.module(), quantizer)
        for sample in data:
            prepared(sample)
        exported = torch.export.export(convert_pt2e(prepared), (x,))
    edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    return ExecutorchModel(bytes(edge.to_executorch().buffer))


def plain_onnx(model: nn.Module, x: torch.Tensor, data: list[torch.Tensor] | None) -> Model:
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

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self._left = iter(data)

            def get_next(self) -> Any:
                sample = next(self._left, None)
                return None if sample is None else {name: sample.numpy()}

        quantize_static(path, quantized, Reader(), per_channel=True)
        return OnnxModel(quantized.read_bytes(), threads=1)


def plain_openvino(model: nn.Module, x: torch.Tensor, data: list[torch.Tensor] | None) -> Model:
    """OpenVINO's convert_model, and nncf.quantize."""
    import nncf
    import openvino

    converted = openvino.convert_model(model, example_input=x, input=[tuple(x.shape)])
    if data is not None:
        samples = nncf.Dataset([sample.numpy() for sample in data])
        converted = nncf.quantize(converted, samples, subset_size=len(data))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plain.xml"
        openvino.save_model(converted, path, compress_to_fp16=False)
        return OpenVinoModel(path.read_bytes(), path.with_suffix(".bin").read_bytes(), threads=1)


PLAIN = {".pte": plain_pte, ".onnx": plain_onnx, ".xml": plain_openvino}


def variants(
    model: nn.Module, x: torch.Tensor, precision: str, folder: Path
) -> Iterator[tuple[str, Any]]:
    """Yield what is measured, by name."""
    data = [torch.randn_like(x) for _ in range(8)] if precision == "int8" else None
    for suffix in SUFFIXES:
        with contextlib.suppress(torchfuse.UnsupportedError):
            path = folder / f"{precision}{suffix}"
            torchfuse.export(model, x, path, precision=precision, calibration=data)
            yield f"torchfuse {suffix}", torchfuse.load(path, threads=1)
        try:
            with quiet(), contextlib.redirect_stdout(io.StringIO()):
                made = PLAIN[suffix](model, x, data)
        except Exception as error:  # noqa: BLE001  # a peer that cannot is part of the result
            print(f"  plain {suffix}: {str(error).splitlines()[0]:.90}", file=sys.stderr)
            continue
        yield f"plain {suffix}", made
    if precision == "fp32":
        yield "eager", model


def sqnr_db(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Return the ratio of signal to noise, in dB."""
    noise = (expected - got).square().sum().clamp(min=1e-30)
    return float(10 * (expected.square().sum() / noise).log10())


def measured(name: str, model: nn.Module, precision: str, runs: int) -> dict[str, Any]:
    """Return the medians, the SQNRs, and the ratios that the target is about."""
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        found = dict(variants(model, x, precision, Path(folder)))
        expected = model(x)
        quality = {key: sqnr_db(expected, call(x)) for key, call in found.items()}
        times = measure_interleaved(found, Case((x,)), runs=runs, threads=1)
    ours = {key: times[key] for key in times if key.startswith("torchfuse")}
    # In int8 a peer counts only where it is as good, within 1 dB.
    best_db = max(quality[key] for key in ours)
    peers = {
        key: times[key]
        for key in times
        if key.startswith("plain") and (precision == "fp32" or quality[key] >= best_db - 1)
    }
    row: dict[str, Any] = {
        "model": name,
        "precision": precision,
        "median_ms": {key: each.median_s * 1e3 for key, each in times.items()},
        "sqnr_db": quality,
        "own_runtime": {
            suffix: str(ratio(times[f"torchfuse {suffix}"], times[f"plain {suffix}"]))
            for suffix in SUFFIXES
            if {f"torchfuse {suffix}", f"plain {suffix}"} <= set(times)
        },
    }
    fastest = min(ours.values(), key=lambda each: each.median_s)
    if peers:
        peer = min(peers.values(), key=lambda each: each.median_s)
        row["fastest"], row["fastest_peer"] = fastest.name, peer.name
        row["ratio"] = ratio(fastest, peer).value
        row["ratio_text"] = str(ratio(fastest, peer))
    return row


def main() -> None:
    """Print a block for each model and precision; write all of it as JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", action="append")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--fp32", action="store_true")
    parser.add_argument("--int8", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    precisions = [p for p in ("fp32", "int8") if getattr(given, p)] or ["fp32", "int8"]
    rows = []
    for name, make in models().items():
        if given.only and name not in given.only:
            continue
        for precision in precisions:
            row = measured(name, as_if_trained(make()), precision, given.runs)
            rows.append(row)
            print(f"{name}, {precision}")
            for key, median in sorted(row["median_ms"].items(), key=lambda item: item[1]):
                print(f"  {key:18} {median:9.2f} ms   {row['sqnr_db'][key]:6.1f} dB")
            if "ratio" in row:
                print(f"  {row['fastest']} / {row['fastest_peer']}: {row['ratio_text']}")
            for suffix, text in row["own_runtime"].items():
                print(f"  torchfuse {suffix} / plain {suffix}: {text}", flush=True)
            if given.json is not None:
                given.json.write_text(json.dumps(rows, indent=2) + "\n")
    ratios = torch.tensor([row["ratio"] for row in rows if "ratio" in row])
    if len(ratios):
        mean = ratios.log().mean().exp()
        print(f"geometric mean of the fastest against the fastest plain file: {mean:.3f}")


if __name__ == "__main__":
    main()
