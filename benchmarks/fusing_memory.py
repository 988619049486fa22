"""How much memory fusing takes beyond a forward pass, on a model of one gigabyte.

    python benchmarks/fusing_memory.py --json fusing_memory.json

The peak resident memory of a process that builds the model, runs it, and fuses it in place. Ends
with status 1 if fusing without keeping originals, verified or not, takes more than twice the
largest layer beyond what the pass took.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import torchfuse

CHANNELS, LAYERS = 4096, 16  # 64 MiB of weights each
LAYER_BYTES = CHANNELS * CHANNELS * 4
ALLOWED_LAYERS = 2

VARIANTS = {
    "forward pass": None,
    "verify=False, keep_originals=False": {"verify": False, "keep_originals": False},
    "keep_originals=False": {"keep_originals": False},
    "as by default": {},
}
JUDGED = ("verify=False, keep_originals=False", "keep_originals=False")


def main() -> None:
    """Measure each variant in a process of its own, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_measure(options.measure)))
        return
    extra = {}
    for name in VARIANTS:
        command = [sys.executable, __file__, "--measure", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        before, after = json.loads(done.stdout.splitlines()[-1])
        extra[name] = after - before
    title = f"Peak memory beyond a forward pass, model of {LAYERS * LAYER_BYTES / 1e9:.2f} GB"
    table = Table(title=title)
    table.add_column("fuse(inplace=True, …)")
    table.add_column("MB", justify="right")
    table.add_column(f"layers of {LAYER_BYTES / 1e6:.0f} MB", justify="right")
    for name, size in extra.items():
        table.add_row(name, f"{size / 1e6:.0f}", f"{size / LAYER_BYTES:.2f}")
    Console(width=100).print(table)
    if options.json:
        report = {"torch": torch.__version__, "layer_bytes": LAYER_BYTES, "extra_bytes": extra}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(any(extra[name] > ALLOWED_LAYERS * LAYER_BYTES for name in JUDGED))


def _measure(name: str) -> tuple[int, int]:
    """Return the peak resident bytes of this process before and after the variant ran."""
    torch.set_num_threads(1)
    blocks = (
        (nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS))
        for _ in range(LAYERS)
    )
    model = nn.Sequential(*(layer for block in blocks for layer in block)).eval()
    inputs = torch.randn(1, CHANNELS, 2, 2)
    with torch.no_grad():
        model(inputs)
    small = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).eval()
    torchfuse.fuse(small, torch.randn(1, 2, 2, 2))  # what is loaded on first use is no part of it
    options = VARIANTS[name]
    before = _peak_bytes()
    if options is None:
        with torch.no_grad():
            model(inputs)
    else:
        result = torchfuse.fuse(model, inputs, inplace=True, **options)
        assert len(result.plan.fusions) == LAYERS
    return before, _peak_bytes()


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
