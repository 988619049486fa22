"""On a GPU: the tests that need one, and the coverage of ten models with TF32 on.

    python benchmarks/on_gpu.py --json on_gpu.json

Prints, for each model, how many of its foldable batch norms are folded, and how far the outputs
move in float64 (relative). Ends with status 1 if a test fails, or a model falls short.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torchfuse
from support import foldable
from support.zoo import FAMILIES, HAND_WRITTEN, Entry

_MODELS = 10
_MAX_REL = 1e-5  # float32 weights, rounded once


def main() -> None:
    """Run the tests and the models, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU that torch can use here.")
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "cuda"], check=False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    rows = [_row(entry) for entry in (*HAND_WRITTEN, *FAMILIES)[:_MODELS]]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, TF32 on")
    for row in rows:
        print(f"{row['model']:32} {row['folded']:4} of {row['expected']:4}  {row['max_rel']:.1e}")
    if options.json:
        options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}))
    good = all(r["folded"] >= r["expected"] and r["max_rel"] <= _MAX_REL for r in rows)
    sys.exit(0 if good and tests.returncode == 0 else 1)


def _row(entry: Entry) -> dict[str, Any]:
    model, image = entry.model(), entry.inputs()
    expected = foldable.count(model, image).foldable
    model, image = model.cuda(), image.cuda()
    result = torchfuse.fuse(model, image)
    wide = [m.double() for m in (model, result.model)]
    with torch.no_grad():
        before, after = (tree_leaves(m(image.double())) for m in wide)
    apart = max((a - b).abs().max() / a.abs().max() for a, b in zip(before, after, strict=True))
    folded = len(result.plan.fusions)
    return {"model": entry.name, "expected": expected, "folded": folded, "max_rel": apart.item()}


if __name__ == "__main__":
    main()
