"""Fuse random networks; count those that are wrong afterwards, or that crash it.

    python benchmarks/random_networks.py --cases 10000 --json random_networks.json
    python benchmarks/random_networks.py --unmerged        # exported programs, judged bit for bit

With --unmerged the networks are layers that were split into branches, chains and affines: their
programs must be merged to as few layers again, and give exactly the same numbers.
Prints the source of each network that fails. Ends with status 1 if any did.
"""

import argparse
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torchfuse
from support.judge import problems
from support.networks import network
from support.unmerged_networks import Unmerged, judged, unmerged


def main() -> None:
    """Run the cases, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--unmerged", action="store_true", help="networks that were un-merged")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    count: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    failing = []
    began = time.perf_counter()
    for seed in range(options.first, options.first + options.cases):
        drawn = (unmerged if options.unmerged else network)(Random(seed), seed)
        try:
            if isinstance(drawn, Unmerged):
                plan, found = judged(drawn)
            else:
                plan = torchfuse.plan(drawn.model, drawn.inputs(0))
                found = problems(drawn)
            kind = "wrong" if found else "right"
        except Exception:  # noqa: BLE001  # a crash is what is counted here
            found, kind = [traceback.format_exc()], "crashed"
            plan = None
        count[kind] += 1
        if plan is not None:
            count["fused"] += len(plan.fusions)
            count["skipped"] += len(plan.skips)
            count["networks with a fusion"] += bool(plan.fusions)
            reasons.update(_without_names(skip.reason) for skip in plan.skips)
        if found:
            failing.append({"seed": seed, "kind": kind, "problems": found})
            print(f"\n── seed {seed}: {kind}", *found, drawn.source, sep="\n", flush=True)
        if (seed + 1) % 500 == 0:
            print(f"{seed + 1}: {dict(count)}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - began

    print(f"{options.cases} random networks, {seconds:.0f} s, one thread")
    table = Table()
    table.add_column("")
    table.add_column("count", justify="right")
    rows = ("right", "wrong", "crashed", "networks with a fusion", "fused", "skipped")
    for row in rows:
        table.add_row(row, str(count[row]))
    Console(width=100).print(table)
    for reason, times in reasons.most_common(12):
        print(f"{times:6d}  {reason}")
    if options.json:
        report = {
            "cases": options.cases,
            "first_seed": options.first,
            "seconds": round(seconds, 1),
            "torch": torch.__version__,
            **{row.replace(" ", "_"): count[row] for row in rows},
            "failing": failing,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(bool(failing))


def _without_names(reason: str) -> str:
    """Return the reason with module paths and numbers replaced, so that equal ones add up."""
    return " ".join(
        "…" if any(c.isdigit() or c in "`'\"_" for c in word) else word for word in reason.split()
    )


if __name__ == "__main__":
    main()
