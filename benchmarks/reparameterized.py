"""What is left of re-parameterisable networks in training form, beside timm's own merge.

    python benchmarks/reparameterized.py --json reparameterized.json

Per model: convolutions and norms in the program as exported, after `torchfuse.fuse_exported`, in
that of the module that `torchfuse.fuse` gives, and after timm's `reparameterize_model`; how far the
outputs of the program are from the original's in float64, and of the module in float32; with
`--runs`, the latency of the `.pte` before (batch norms folded, nothing more), after, and of timm's
merge, interleaved, one thread. Needs timm. Ends with status 1 if more is left than timm leaves, or
an output differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import verdict_table.torchvision_without_cuda  # noqa: F401  # or timm could not be imported
from torch import Tensor, nn

import timm  # isort: skip
from timm.utils import reparameterize_model  # isort: skip

import torchfuse  # isort: skip
from torchfuse.fusing.programs.program_fusing import fold
from torchfuse.lowering import capture as capturing
from torchfuse.measuring.timing import measure_interleaved, ratio
from torchfuse.models.batch_norms import settle_batch_norms

MODELS = ("repvgg_a0", "mobileone_s0", "repvit_m0_9", "repvit_m1", "fastvit_t8", "repghostnet_100")
WITHIN = 1e-9  # max|a − b| / max|a| in float64
NARROW = 1e-4  # in float32
LAYERS = ("conv1d", "conv2d", "conv3d")


@dataclass(frozen=True)
class Row:
    """One model."""

    model: str
    exported: tuple[int, int]  # convolutions, norms
    fused: tuple[int, int]
    module: tuple[int, int]  # of what `fuse` gives
    timm: tuple[int, int]
    max_rel: float  # of the fused program, in float64
    module_max_rel: float  # of the fused module, in float32
    fuse_s: float  # of the program
    module_s: float
    latency_ms: dict[str, float]  # medians of "before", "after", "timm"
    ratios: dict[str, tuple[float, float | None, float | None]]  # value, low, high

    @property
    def good(self) -> bool:
        """Whether no more is left than timm leaves, and nothing changed."""
        left = max(sum(self.fused), sum(self.module))
        right = self.max_rel <= WITHIN and self.module_max_rel <= NARROW
        return left <= sum(self.timm) and right


def main() -> None:
    """Run the models, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--runs", type=int, default=0, help="timed runs of each .pte")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    columns = ("exported", "program", "module", "timm", "max rel.", "s", "max rel.", "s")
    print(("{:16} {:>10} {:>9} {:>9} {:>9} " + "{:>9} {:>6} " * 2).format("", *columns))
    for name in MODELS:
        if options.only in name:
            rows.append(row := row_of(name, options.runs))
            found = (row.exported, row.fused, row.module, row.timm)
            counts = (f"{convs} + {norms}" for convs, norms in found)
            print("{:16} {:>10} {:>9} {:>9} {:>9}".format(name, *counts), end=" ")
            print(f"{row.max_rel:9.1e} {row.fuse_s:6.1f} {row.module_max_rel:9.1e}", end=" ")
            print(f"{row.module_s:6.1f}", "" if row.good else "falls short")
            for other, (value, low, high) in row.ratios.items():
                known = "too few runs to say" if low is None else f"{low:.2f} … {high:.2f}"
                print(f"{'':4}after / {other}: {value:.3f} ({known})", end="")
                print(f", {row.latency_ms['after']:.2f} / {row.latency_ms[other]:.2f} ms")
            if options.json:
                report = {"torch": torch.__version__, "models": [asdict(row) for row in rows]}
                options.json.write_text(json.dumps(report, indent=2) + "\n")
            sys.stdout.flush()
    sys.exit(not all(row.good for row in rows))


def row_of(name: str, runs: int) -> Row:
    """Return what is left of one model, and how fast it is."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    size = model.default_cfg["input_size"][-1]
    image = torch.randn(1, 3, size, size)
    settle_batch_norms(model, torch.randn(2, 3, size, size))
    program = torch.export.export(model, (image,), strict=False)
    start = time.perf_counter()
    fused = torchfuse.fuse_exported(program).model
    fuse_s = time.perf_counter() - start
    start = time.perf_counter()
    module = torchfuse.fuse(model, image).model
    module_s = time.perf_counter() - start
    with torch.no_grad():
        a, b = model(image), module(image)
    merged = reparameterize_model(model)
    latency, ratios = latencies(model, merged, image, runs) if runs else ({}, {})
    return Row(
        name,
        layers(program),
        layers(fused),
        layers(torch.export.export(module, (image,), strict=False)),
        layers(torch.export.export(merged, (image,), strict=False)),
        difference(model, image),
        ((a - b).abs().max() / a.abs().max()).item(),
        fuse_s,
        module_s,
        latency,
        ratios,
    )


def layers(program: torch.export.ExportedProgram) -> tuple[int, int]:
    """Return how many convolutions and batch norms a program has."""
    names = [str(node.target).split(".")[1:2] for node in program.graph.nodes]
    return sum(names.count([layer]) for layer in LAYERS), names.count(["batch_norm"])


def difference(model: nn.Module, image: Tensor) -> float:
    """Return max|a − b| / max|a| of the fused program in float64."""
    import copy

    wide = copy.deepcopy(model).double()
    program = torch.export.export(wide, (image.double(),), strict=False)
    fused = torchfuse.fuse_exported(program, verify=False).model
    with torch.no_grad():
        a, b = wide(image.double()), fused.module()(image.double())
    return ((a - b).abs().max() / a.abs().max()).item()


def latencies(
    model: nn.Module, merged: nn.Module, image: Tensor, runs: int
) -> tuple[dict[str, float], dict[str, tuple[float, float | None, float | None]]]:
    """Return medians in ms, and the ratios of "after" to the others."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.pte" for name in ("before", "after", "timm")}
        with patch.object(capturing, "fuse_all", fold):  # as it was before there were other rules
            torchfuse.export(model, image, files["before"])
        torchfuse.export(model, image, files["after"])
        torchfuse.export(merged, image, files["timm"])
        taken = measure_interleaved(files, image, runs=runs)
    ratios = {}
    for other in ("before", "timm"):
        found = ratio(taken["after"], taken[other])
        ratios[other] = (found.value, found.low, found.high)
    return {name: one.median_s * 1e3 for name, one in taken.items()}, ratios


if __name__ == "__main__":
    main()
