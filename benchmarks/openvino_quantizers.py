"""OpenVINO in int8: `nncf.quantize` against ExecuTorch's OpenVINOQuantizer on the same graph.

MobileNetV2 has ImageNet weights and photos, the others random ones. Both calibrate on the same
images, and both files run in OpenVINO on one thread. Shown is the ratio
of signal to noise over other images, against the model in float, and the ratio of the times.

    python benchmarks/openvino_quantizers.py [--only NAME] [--json FILE] [--clock cpu]
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.append(str(Path(sys.prefix) / "models"))  # where `make targets` puts timm

from target_table.models import MODELS

import torchfuse
from torchfuse.cases import Case
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.measuring.timing import measure_interleaved, ratio
from torchfuse.quantizing.metrics import sqnr_of_outputs
from torchfuse.quantizing.static import float_graph
from torchfuse.targets.openvino.compiled_model import OpenVinoModel

TRAINED = "mobilenet_v2, trained"
NETS = (TRAINED, "resnet18", "vit_tiny_patch16_224")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CALIBRATION, SAMPLES = 16, 32


def trained() -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """Return MobileNetV2 with ImageNet weights, with views of some photos, and of others."""
    from quantization_accuracy import package, pretrained, views

    photos = sorted((package("foolbox") / "data").glob("imagenet_*.jpg"))
    given, others = photos[: CALIBRATION // 2], photos[CALIBRATION // 2 :]
    data, samples = (
        [view for path in paths for view in views(path)[:count].split(1)]
        for paths, count in ((given, 2), (others, 3))
    )
    return pretrained(), data, samples


def untrained(name: str) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """Return a model with random weights, with random images, and with others."""
    entry = MODELS[name]
    data, samples = entry.inputs(CALIBRATION, seed=3), entry.inputs(SAMPLES, seed=4)
    return entry.model(), list(data.split(1)), list(samples.split(1))


def by_executorchs_quantizer(model: nn.Module, data: list[Tensor]) -> OpenVinoModel:
    """Return the model quantized by OpenVINOQuantizer and NNCF's quantize_pt2e."""
    with known_warnings_ignored(), contextlib.redirect_stdout(io.StringIO()):
        import nncf
        import openvino
        from executorch.backends.openvino.quantizer import OpenVINOQuantizer
        from nncf.experimental.torch.fx import quantize_pt2e

        cases = [Case((sample,)) for sample in data]
        graph = float_graph(model, cases[0], cases, None)
        quantized = quantize_pt2e(
            graph, OpenVINOQuantizer(), nncf.Dataset(data), subset_size=len(data)
        )
        exported = torch.export.export(quantized, (data[0],))
        converted = openvino.convert_model(exported)
        converted.reshape(list(data[0].shape))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.xml"
            openvino.save_model(converted, path, compress_to_fp16=False)
            weights = path.with_suffix(".bin").read_bytes()
            return OpenVinoModel(path.read_bytes(), weights, threads=1)


def by_nncf(model: nn.Module, data: list[Tensor]) -> Any:
    """Return torchfuse's file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        torchfuse.export(model, data[0], path, precision="int8", calibration=data)
        return torchfuse.load(path, threads=1)


def outputs(call: Any, samples: list[Tensor]) -> list[list[Tensor]]:
    """Return the tensors that a model or a file returns for each sample."""
    return [pytree.tree_leaves(call(sample)) for sample in samples]


def main() -> None:
    """Print a line for each net, and write all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=(TRAINED, *MODELS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    print(f"{'':22} {'nncf.quantize':>14} {'OpenVINOQuantizer':>18}  time of the first / second")
    for name in given.only or NETS:
        model, data, samples = trained() if name == TRAINED else untrained(name)
        with torch.no_grad():
            made = {
                "nncf": by_nncf(model, data),
                "executorch": by_executorchs_quantizer(model, data),
            }
            expected = outputs(model, samples)
            quality = {
                key: sqnr_of_outputs(expected, outputs(call, samples)) for key, call in made.items()
            }
            times = measure_interleaved(
                made, Case((data[0],)), runs=given.runs, threads=1, clock=CLOCKS[given.clock]
            )
        found = ratio(times["nncf"], times["executorch"])
        rows.append({"model": name, "sqnr_db": quality, "ratio": found.value})
        print(
            f"{name:22} {quality['nncf']:>11.1f} dB {quality['executorch']:>15.1f} dB  {found}",
            flush=True,
        )
        if given.json:
            given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
