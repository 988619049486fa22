"""How many of the batch norms that can be folded are folded, and how far the outputs move.

    python benchmarks/coverage.py --json coverage.json

The expected count of each model is read off torch.export's ATen graph. Ends with status 1 if a
model falls short of it, or differs by more than 1e-4.
"""

import argparse
import dataclasses
import json
import sys
import traceback
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.coverage_of_model import Coverage, coverage
from support.zoo import FAMILIES, HAND_WRITTEN
from support.zoo.more_families import MORE_FAMILIES

MAX_REL = 1e-4


def main() -> None:
    """Run the models, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--skips", action="store_true", help="print each skip's reason")
    options = parser.parse_args()
    torch.set_num_threads(1)

    rows: list[Coverage] = []
    failed: list[str] = []
    for entry in (*HAND_WRITTEN, *FAMILIES, *MORE_FAMILIES):
        if options.only.lower() not in entry.name.lower():
            continue
        print(entry.name, file=sys.stderr, flush=True)
        try:
            rows.append(coverage(entry))
        except Exception:  # noqa: BLE001  # one model that fails must not hide the others
            failed.append(entry.name)
            traceback.print_exc()
    bad = [row for row in rows if not _good(row)]
    Console(width=110).print(_table(rows))
    if options.skips:
        for row in rows:
            for skip in row.skips:
                print(f"{row.model}: {skip}")
    for name in failed:
        print(f"{name}: could not be run")
    covered, expected = sum(row.folded for row in rows), sum(row.expected for row in rows)
    print(f"{covered} of {expected} foldable batch norms folded in {len(rows)} models.")
    if options.json:
        report = {
            "torch": torch.__version__,
            "models": [dataclasses.asdict(row) for row in rows],
            "failed": failed,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(bool(bad or failed))


def _good(row: Coverage) -> bool:
    return row.folded >= row.expected and row.max_rel is not None and row.max_rel <= MAX_REL


def _table(rows: list[Coverage]) -> Table:
    table = Table(title="Batch norms folded, one thread, float32")
    table.add_column("model")
    for heading in ("batch norms", "foldable", "folded", "max rel. difference", "fuse, s", ""):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.model,
            str(row.batch_norms),
            str(row.expected),
            str(row.folded),
            "–" if row.max_rel is None else f"{row.max_rel:.1e}",
            f"{row.fuse_s:.2f}",
            "" if _good(row) else "falls short",
        )
    return table


if __name__ == "__main__":
    main()
