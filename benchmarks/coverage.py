"""How many of the batch norms that can be folded are folded, and how far the outputs move.

    python benchmarks/coverage.py --json coverage.json
    python benchmarks/coverage.py --groups timm torchvision --brief

By `fuse` and by `fuse_exported`, on models of this repository and of transformers, on the smallest
with batch norms of each of timm's families, and on torchvision's list. The expected count of each
model is read off torch.export's ATen graph. Outputs are compared on inputs that were not planned
on; where a model amplifies rounding to more than 1e-4, float64 decides. Ends with status 1 if a
model falls short of the count, differs, or raises an error.
"""

import argparse
import dataclasses
import json
import sys
import traceback
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from verdict_table.models import BUILDERS

from support.coverage_of_model import Coverage, Folded, coverage_of


def main() -> None:
    """Run the models, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--groups", nargs="+", choices=BUILDERS, default=["coverage"], help="default: coverage"
    )
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--brief", action="store_true", help="only what falls short, and the sums")
    parser.add_argument("--skips", action="store_true", help="print each skip's reason")
    options = parser.parse_args()
    missing = [name for name in options.groups if name != "coverage" and not find_spec(name)]
    if missing:
        parser.error(f"{' and '.join(missing)} cannot be imported: install it, or leave it out")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the models' own

    rows: dict[str, list[Coverage]] = {group: [] for group in options.groups}
    failed: list[str] = []
    for group, found in rows.items():
        for name, build in BUILDERS[group]().items():
            if options.only.lower() not in name.lower():
                continue
            print(name, file=sys.stderr, flush=True)
            try:
                built = build()
                found.append(coverage_of(name, built.model, built.inputs))
            except Exception:  # noqa: BLE001  # one model that fails must not hide the others
                failed.append(name)
                traceback.print_exc()
            if options.json:
                report = {
                    "torch": torch.__version__,
                    "groups": {
                        name: [dataclasses.asdict(row) for row in some]
                        for name, some in rows.items()
                    },
                    "failed": failed,
                }
                options.json.write_text(json.dumps(report, indent=2) + "\n")
    every = [row for some in rows.values() for row in some]
    shown = [row for row in every if row.falls_short or not options.brief]
    if shown:
        Console(width=140).print(_table(shown))
    if options.skips:
        for row in every:
            for skip in row.skips:
                print(f"{row.model}: {skip}")
    for name in failed:
        print(f"{name}: could not be run")
    for group, some in rows.items():
        print(_sum(group, some))
    sys.exit(bool(failed or any(row.falls_short for row in every)))


def _sum(group: str, rows: list[Coverage]) -> str:
    counted = [(row.expected, row) for row in rows if row.expected is not None]
    text = f"{group}: {sum(n for n, _ in counted)} foldable batch norms in {len(counted)} models"
    for name in ("fuse", "fuse_exported"):
        sides = [(n, getattr(row, name).norms) for n, row in counted if getattr(row, name)]
        folded = sum(min(n, norms) for n, norms in sides)
        merged = sum(max(0, norms - n) for n, norms in sides)
        text += f"; {name} folds {folded}"
        text += f", and {merged} with whole branches" if merged else ""
        if name == "fuse":
            left = [row.model for n, row in counted if row.fuse.norms < n and not row.falls_short]
            said = "the rest with graph=True, by what it says of them"
            text += f" ({said}: {', '.join(left)})" if left else ""
    others = [row.fuse.norms for row in rows if row.expected is None]
    if others:
        text += f". {len(others)} models torch.export cannot take: fuse folds {sum(others)} there"
    return f"{text}."


def _table(rows: list[Coverage]) -> Table:
    table = Table(title="Batch norms folded, one thread")
    table.add_column("model")
    sides = ("fuse", "differs by", "takes, s", "fuse_exported", "differs by", "falls short")
    for heading in ("batch norms", "foldable", *sides):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.model,
            "–" if row.batch_norms is None else str(row.batch_norms),
            "–" if row.expected is None else str(row.expected),
            str(row.fuse.norms),
            _difference(row.fuse),
            f"{row.fuse_s:.2f}",
            "–" if row.fuse_exported is None else str(row.fuse_exported.norms),
            _difference(row.fuse_exported),
            row.falls_short,
        )
    return table


def _difference(folded: Folded | None) -> str:
    if folded is None or folded.max_rel is None:
        return "–"
    return f"{folded.max_rel:.1e}{' (float64)' if folded.dtype == 'float64' else ''}"


if __name__ == "__main__":
    main()
