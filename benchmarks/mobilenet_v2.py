"""MobileNetV2 at 1×3×224×224: what fusing, quantizing and the mobile runtime buy on this machine.

One thread, one process, inference mode, variants in turns in random order; medians. The
baseline is the non-fused fp32 eager model, contiguous. ExecuTorch folds batch norms when it lowers
a model, so a `.pte` has one row per precision, and no row that is not fused.

    python benchmarks/mobilenet_v2.py --json mobilenet_v2.json
"""

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import torchfuse
from torchfuse.artifacts import write_atomically
from torchfuse.cases import Case
from torchfuse.devices.facts import DeviceFacts, facts_of
from torchfuse.devices.local import Local
from torchfuse.errors import UnsupportedError
from torchfuse.measuring.timing import Measurement, measure_interleaved, ratio
from torchfuse.models.batch_norms import settle_batch_norms
from torchfuse.models.mobilenet_v2 import INPUT_SHAPE, MobileNetV2
from torchfuse.runner.allocator import keep_freed_memory
from torchfuse.targets.torchscript import mobile_optimizer, scripting
from torchfuse.units import duration

BASELINE = "eager fp32"
TARGETS = {".pte int8": 5.0, ".pte fp32": 2.5}  # times as fast as the baseline, with AVX-512 VNNI

_VNNI = "avx512_vnni"

Variants = dict[str, Callable[[], Any]]


def main() -> None:
    """Measure, print the table, and save every sample."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument(
        "--runs", type=int, default=100, help="timed calls of each (default: %(default)s)"
    )
    arguments.add_argument("--json", type=Path, help="save every sample and ratio there")
    options = arguments.parse_args()
    keep_freed_memory()  # here, too, as in the processes that files are measured in
    if options.json:
        write_atomically(options.json, b"{}\n")  # known to be writable before measuring
    torch.set_num_threads(1)
    variants = dict(made())
    measured = measure_interleaved(
        variants,
        (),
        runs=options.runs,
        on_round=lambda done, total: progress(f"round {done} of {total}"),
    )
    progress("")
    machine = facts_of(Local())
    print(table(measured, machine))
    for caution in dict.fromkeys(c for m in measured.values() for c in m.cautions):
        print(f"Warning: {caution}.", file=sys.stderr)
    if options.json:
        write_atomically(options.json, report(measured, machine).encode())


def made() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield every variant by its name, as a call that takes nothing."""
    torch.manual_seed(0)
    x = torch.randn(INPUT_SHAPE)
    calibration = [torch.randn(INPUT_SHAPE) for _ in range(8)]
    model = settle_batch_norms(MobileNetV2(), torch.cat(calibration))
    fused = torchfuse.fuse(model, x).model
    yield BASELINE, bound(model, x)
    yield "eager fp32 fused", bound(fused, x)
    channels_last: dict[str, Any] = {"memory_format": torch.channels_last}
    for name, eager in (("eager fp32", model), ("eager fp32 fused", fused)):
        moved = copy.deepcopy(eager).to(**channels_last)
        yield f"{name}, channels_last", bound(moved, x.to(**channels_last))
    scripted = scripting.script(model, Case((x,))).module
    yield "TorchScript fp32", bound(mobile_optimizer.frozen(scripted), x)
    yield "TorchScript fp32 fused", bound(torchfuse.optimize_for_mobile(scripted), x)
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "fp16", "int8"):
            progress(f"exporting .pte {precision}")
            path = Path(folder) / f"{precision}.pte"
            data = calibration if precision == "int8" else None
            try:
                torchfuse.export(model, x, path, precision=precision, calibration=data)
            except UnsupportedError as error:
                progress("")
                print(f"Left out: .pte {precision}: {error}", file=sys.stderr)
                continue
            yield f".pte {precision}", bound(torchfuse.load(path), x)


def bound(model: Callable[..., Any], x: torch.Tensor) -> Callable[[], Any]:
    """Return the call of `model` on its own input."""
    return lambda: model(x)


def table(measured: dict[str, Measurement], machine: DeviceFacts) -> str:
    """Return a line per variant, and one on each target."""
    baseline = measured[BASELINE]
    width = max(map(len, measured))
    lines = [
        f"MobileNetV2, {'×'.join(map(str, INPUT_SHAPE))}, 1 thread, {baseline.runs} runs, "
        f"{machine.soc}, AVX-512 VNNI: {'yes' if _VNNI in machine.instructions else 'no'}",
        "",
        f"{'':{width}}  {'median':>9} {'± IQR':>9}  times as fast as {BASELINE} (95% interval)",
    ]
    for name, measurement in measured.items():
        centre = measurement.median_s
        speed_up = "1" if name == BASELINE else str(ratio(baseline, measurement))
        lines.append(
            f"{name:{width}}  {duration(centre):>9} {duration(measurement.iqr_s, centre):>9}  "
            f"{speed_up}"
        )
    lines.append("")
    for name, target in TARGETS.items():
        if name in measured:
            lines.append(verdict(name, target, ratio(baseline, measured[name]).value, machine))
    return "\n".join(lines)


def verdict(name: str, target: float, value: float, machine: DeviceFacts) -> str:
    """Return the sentence on one target; it is judged only where the instructions exist."""
    wanted = f"{name}: {value:.2f} times as fast, the target is {target:g}"
    if _VNNI not in machine.instructions:
        return f"{wanted} on a processor with AVX-512 VNNI, which this is not: not judged."
    return f"{wanted}: {'met' if value >= target else 'missed'}."


def report(measured: dict[str, Measurement], machine: DeviceFacts) -> str:
    """Return everything as JSON."""
    baseline = measured[BASELINE]
    ratios = {
        name: {**asdict(found), "measurable": found.measurable}
        for name, measurement in measured.items()
        if name != BASELINE
        for found in [ratio(baseline, measurement)]
    }
    return json.dumps(
        {
            "model": "MobileNetV2",
            "input_shape": INPUT_SHAPE,
            "versions": {name: version(name) for name in ("torch", "executorch", "torchao")},
            "machine": asdict(machine),
            "baseline": BASELINE,
            "times_as_fast_as_baseline": ratios,
            "targets": TARGETS,
            "judged": _VNNI in machine.instructions,
            "results": [
                {**asdict(m), "median_s": m.median_s, "iqr_s": m.iqr_s} for m in measured.values()
            ],
        },
        indent=2,
    )


def progress(text: str) -> None:
    """Show what is going on, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r{text:40}", end="" if text else "\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
