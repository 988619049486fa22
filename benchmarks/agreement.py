"""Where `fuse` and `fuse_exported` do not fold the same batch norms, and why.

    python benchmarks/agreement.py --json agreement.json --timm

On the models of benchmarks/coverage.py and, with `--timm`, on the smallest model with batch norms
of each of timm's families. A batch norm that only one of the two folds is shown with the reason
that the other gives. Nothing is verified unless `--verify` is given: that is what `fuse` itself and
the coverage are for. What the other rules merge in a program is left out. Ends with status 1 if the
two do not agree somewhere.
"""

import argparse
import importlib
import json
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
if find_spec("torchvision"):  # timm and transformers import it
    import verdict_table.torchvision_without_cuda  # noqa: F401

import torchfuse
from support.zoo import FAMILIES, HAND_WRITTEN, Entry
from support.zoo.more_families import MORE_FAMILIES
from torchfuse.planning import FusionPlan
from torchfuse.rules import RULES

_FOLDS = tuple(rule.name for rule in RULES)
# The smallest model with batch norms of each of timm's families, and the side of its images
_TIMM = Path(__file__).with_name("verdict_table") / "timm_families.tsv"


@dataclass(frozen=True)
class OneOnly:
    """A batch norm that one of the two folds."""

    norm: str  # its path
    folded_by: str
    reason: str  # why the other does not; empty if that says nothing of it


@dataclass(frozen=True)
class Row:
    """One model."""

    model: str
    fuse: int  # batch norms folded
    fuse_exported: int
    both: int
    one_only: tuple[OneOnly, ...]
    error: str | None = None  # one of the two could not be asked


def main() -> None:
    """Run the models, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--timm", action="store_true", help="models of timm too")
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--every", type=int, default=1, help="only each n-th model")
    parser.add_argument("--verify", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    entries = [*HAND_WRITTEN, *FAMILIES, *MORE_FAMILIES, *(_of_timm() if options.timm else ())]
    chosen = [entry for entry in entries if options.only.lower() in entry.name.lower()]
    rows: list[Row] = []
    for entry in chosen[:: options.every]:
        print(entry.name, file=sys.stderr, flush=True)
        rows.append(_row(entry, verify=options.verify))
        if options.json:
            report = {"torch": torch.__version__, "models": [asdict(row) for row in rows]}
            options.json.write_text(json.dumps(report, indent=2) + "\n")
    Console(width=150).print(_table(rows))
    differing = [row for row in rows if row.one_only or row.error]
    print(f"The two agree on {len(rows) - len(differing)} of {len(rows)} models.")
    sys.exit(bool(differing))


def _of_timm() -> list[Entry]:
    timm = importlib.import_module("timm")

    def made(name: str) -> Callable[[], nn.Module]:
        return lambda: timm.create_model(name)

    listed = [line.split("\t") for line in _TIMM.read_text().splitlines() if line[:1] != "#"]
    return [Entry(name, made(name), (3, int(side), int(side))) for name, side in listed]


def _row(entry: Entry, *, verify: bool) -> Row:
    try:
        model, inputs = entry.model(), (entry.inputs(),)
        plans = {
            "fuse": torchfuse.fuse(model, inputs, rules=_FOLDS, verify=verify).plan,
            "fuse_exported": torchfuse.fuse_exported(
                torch.export.export(model, inputs), rules=_FOLDS, verify=verify
            ).plan,
        }
    except Exception as error:  # noqa: BLE001 - one model that fails must not hide the others
        traceback.print_exc()
        return Row(entry.name, 0, 0, 0, (), f"{type(error).__name__}: {error}".splitlines()[0])
    folded = {name: {f.modules[-1] for f in plan.fusions} for name, plan in plans.items()}
    modules, program = folded.values()
    one_only = [
        *_one_only(modules - program, "fuse", plans["fuse_exported"]),
        *_one_only(program - modules, "fuse_exported", plans["fuse"]),
    ]
    return Row(entry.name, len(modules), len(program), len(modules & program), tuple(one_only))


def _one_only(norms: Iterable[str], folded_by: str, other: FusionPlan) -> list[OneOnly]:
    reasons = {skip.modules[-1]: skip.reason for skip in other.skips}
    return [OneOnly(norm, folded_by, reasons.get(norm, "")) for norm in sorted(norms)]


def _table(rows: list[Row]) -> Table:
    table = Table(title="Batch norms folded")
    for heading in ("model", "fuse", "fuse_exported", "both", "of those that only one folds"):
        table.add_column(heading, justify="left" if heading[0] in "mo" else "right")
    for row in rows:
        figures = map(str, (row.fuse, row.fuse_exported, row.both))
        table.add_row(row.model, *figures, row.error or _why(row))
    return table


def _why(row: Row) -> str:
    """The reasons, the paths in them left out so that those of one kind count as one."""
    counted = Counter(
        (one.folded_by, "`…`".join(one.reason.split("`")[::2]) or "not mentioned")
        for one in row.one_only
    )
    return "\n".join(f"{n} only by {by}: {why}" for (by, why), n in counted.most_common())


if __name__ == "__main__":
    main()
