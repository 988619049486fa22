"""Files of torchfuse beside what each runtime's own documentation makes of the same models.

For each of ten models, in fp32 and in int8: torchfuse's file for each target, and the plain file of
each runtime: ExecuTorch's XnnpackPartitioner (and XNNPACKQuantizer), torch.onnx.export (and ONNX
Runtime's quantize_static), OpenVINO's convert_model with f32 asked for (and nncf.quantize),
aoti_compile_and_package (and X86InductorQuantizer); eager PyTorch beside them. One thread each, in
the same rounds; medians, and ratios with intervals. In int8 a plain file counts only where it is at
most 1 dB and 1 point of agreement worse than ours.

    python benchmarks/targets.py --json targets.json                # all: an hour or two
    python benchmarks/targets.py --only yolo --precision int8 --json targets.json
    python benchmarks/targets.py --table targets.json               # what was measured so far
    python benchmarks/targets.py --delegation                       # what XNNPACK takes: minutes

The JSON is written after each model and precision; what is in it already, of others, stays. Needs
timm; `--clock cpu` is for a machine that others use too.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# What making a file takes is of a first time: what was compiled before is not looked up.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.append(str(Path(sys.prefix) / "models"))  # where `make targets` puts timm

from target_table.models import MODELS
from target_table.plain_files import frozen, plain
from target_table.table import (
    OURS,
    PLAIN,
    SUFFIXES,
    block,
    delegation_table,
    export_table,
    fastest_table,
)

import torchfuse
from torchfuse.artifacts import Artifact, write_atomically
from torchfuse.cases import Case
from torchfuse.errors import UnsupportedError, first_line
from torchfuse.measuring.timing import measure_interleaved
from torchfuse.quantizing.metrics import sqnr_of_outputs
from torchfuse.targets.aotinductor.cpu import this_cpu

PRECISIONS = ("fp32", "int8")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CALIBRATION, SAMPLES = 16, 200  # images


def measured(name: str, precision: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return what was found of one model in one precision, as it lies in the JSON."""
    entry = MODELS[name]
    model, x = entry.model(), entry.inputs(1, seed=1)
    data = calibration(name) if precision == "int8" else None
    files: dict[str, dict[str, Any]] = {}
    callables: dict[str, Callable[..., Any]] = {}

    def add(key: str, make: Callable[[], tuple[Callable[..., Any], dict[str, Any]]]) -> None:
        print(f"  {name}, {precision}: {key}", file=sys.stderr)
        start = cpu_s()
        try:
            callables[key], files[key] = make()
        except Exception as error:  # a peer that cannot is part of the result
            if key.startswith(OURS) and not isinstance(error, UnsupportedError):
                raise
            files[key] = {"error": f"{type(error).__name__}: {first_line(error):.100}"}
            return
        files[key]["made_s"] = cpu_s() - start

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for suffix in given.target or SUFFIXES:
            path = Path(folder) / f"{precision}{suffix}"
            add(f"{OURS}{suffix}", lambda path=path: ours(model, x, path, precision, data))
            if not given.ours:
                add(f"{PLAIN}{suffix}", lambda s=suffix: (plain(s, model, x, data), {}))
        if precision == "fp32" and not given.ours:
            callables["eager"], files["eager"] = model, {"made_s": None}
            add("torch.compile", lambda: (frozen(model, x), {}))
        judge(model, list(entry.inputs(given.samples, seed=4).split(1)), callables, files)
        times = measure_interleaved(
            callables, Case((x,)), runs=given.runs, threads=1, clock=CLOCKS[given.clock]
        )
    for key, each in times.items():
        files[key]["samples_s"] = each.samples_s
    return {
        "model": name,
        "precision": precision,
        "clock": given.clock,
        "cpu": this_cpu()["name"] or platform.machine(),
        "platform": platform.platform(),
        "turn_runs": next(iter(times.values())).turn_runs,
        "files": files,
    }


def cpu_s() -> float:
    """Return the CPU time of this process and of those that it waited for, compilers among them."""
    return sum(os.times()[:4])


def delegated(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return rows of our `.pte` alone, not measured, with what XNNPACK takes of it."""
    rows = []
    for name in given.only or MODELS:
        model, x = MODELS[name].model(), MODELS[name].inputs(1, seed=1)
        for precision in given.precision or PRECISIONS:
            print(f"  {name}, {precision}", file=sys.stderr)
            data = calibration(name) if precision == "int8" else None
            try:
                with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                    _, facts = ours(model, x, Path(folder) / "model.pte", precision, data)
            except UnsupportedError as error:
                facts = {"error": first_line(error)}
            rows.append({"model": name, "precision": precision, "files": {f"{OURS}.pte": facts}})
    return rows


def calibration(name: str) -> list[Tensor]:
    """Return the images that all int8 files of a model are calibrated on."""
    return list(MODELS[name].inputs(CALIBRATION, seed=3).split(1))


def ours(
    model: nn.Module, x: Tensor, path: Path, precision: Any, data: Sequence[Tensor] | None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return torchfuse's file, loaded, and what the delegate took of it."""
    artifact = torchfuse.export(model, x, path, precision=precision, calibration=data)
    facts = {"size_bytes": artifact.size_bytes, "delegation": taken(artifact)}
    return torchfuse.load(path, threads=1), facts


def taken(artifact: Artifact) -> dict[str, Any] | None:
    """Return how much of the program the delegate runs; None: the runtime has no delegates."""
    found = artifact.delegation
    if found is None:
        return None
    return {
        "macs_share": found.macs_share,
        "values_share": found.values_share,
        "pieces": found.partitions,
        "conversions": len(found.conversions),
        "left": {op.operator: op.left for op in found.left},
        "reasons": sorted({reason for op in found.left for reason in op.reasons}),
    }


def judge(
    model: nn.Module,
    samples: Sequence[Tensor],
    callables: dict[str, Callable[..., Any]],
    files: dict[str, dict[str, Any]],
) -> None:
    """Add to each file's facts how far it is from the model on the samples.

    The signal-to-noise ratio over all, of all outputs, and, of a classifier, the share of samples
    that get the model's own class.
    """
    expected = [outputs(model, sample) for sample in samples]
    for key, call in callables.items():
        got = [outputs(call, sample) for sample in samples]
        matched = (zip(a, b, strict=True) for a, b in zip(expected, got, strict=True))
        pairs = [pair for each in matched for pair in each]
        decibels = sqnr_of_outputs(expected, got)
        files[key]["sqnr_db"] = decibels if math.isfinite(decibels) else None  # None: equal
        same = [bool(a.argmax() == b.argmax()) for a, b in pairs if a.dim() == 2]
        files[key]["agreement"] = sum(same) / len(same) if len(same) == len(samples) else None


def outputs(call: Callable[..., Any], sample: Tensor) -> list[Tensor]:
    """Return the tensors that a model or a file returns."""
    return [leaf.clone() for leaf in pytree.tree_leaves(call(sample))]


def warm_up(given: argparse.Namespace) -> None:
    """Import all that making files needs, which is no part of the time that the first takes."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(1, 3, 8, 8)
    with tempfile.TemporaryDirectory() as folder:
        for suffix in given.target or SUFFIXES:
            for precision in given.precision or PRECISIONS:
                data = [x] if precision == "int8" else None
                ours(model, x, Path(folder) / f"{precision}{suffix}", precision, data)
                if not given.ours:
                    plain(suffix, model, x, data)


def merged(path: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the file with this one among them, in the models' order."""
    rows = json.loads(path.read_text()) if path.exists() else []
    kept = {(each["model"], each["precision"]): each for each in [*rows, row]}
    order = [(name, precision) for name in MODELS for precision in PRECISIONS]
    return [kept[key] for key in sorted(kept, key=order.index)]


def tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what was found as three tables."""
    return [*fastest_table(rows), "", *delegation_table(rows), "", *export_table(rows)]


def main() -> None:
    """Print a block for each model and precision, and write all as JSON after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="what was measured, added to")
    parser.add_argument("--only", action="append", choices=MODELS, help="repeatable")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="repeatable")
    parser.add_argument("--target", action="append", choices=SUFFIXES, help="repeatable")
    parser.add_argument("--ours", action="store_true", help="without the plain files")
    parser.add_argument("--runs", type=int, default=30, help="timed calls of each file")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="images to be judged on")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument(
        "--delegation", action="store_true", help="measure nothing, show what XNNPACK takes"
    )
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="measure nothing")
    given = parser.parse_args()
    if given.table:
        rows = [row for path in given.table for row in json.loads(path.read_text())]
        print("\n".join(tables(rows)))
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if given.delegation:
        print("\n".join(delegation_table(delegated(given))))
        return
    warm_up(given)
    rows = []
    for name in given.only or MODELS:
        for precision in given.precision or PRECISIONS:
            row = measured(name, precision, given)
            rows.append(row)
            print("\n".join(block(row)), flush=True)
            if given.json is not None:
                text = json.dumps(merged(given.json, row), indent=1) + "\n"
                write_atomically(given.json, text.encode())
    print("\n".join(["", *tables(rows)]))


if __name__ == "__main__":
    main()
