"""The table as text, made for `git diff`: a line a pair, in an order that no verdict changes."""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from verdict_table.of_model import Digest, Verdicts


def text(rows: Iterable[Verdicts], versions: str) -> str:
    """Return a file of the table; `parse` gives back the rows."""
    lines = [
        "# What torchfuse.fuse decides, written by `python benchmarks/verdicts.py --write`.",
        f"# With {versions}.",
    ]
    for row in rows:
        lines += ["", row.name, *_lines(row)]
    return "\n".join(lines) + "\n"


def _lines(row: Verdicts) -> Iterator[str]:
    if row.inputs:
        yield f"  on {row.inputs}"
    if not row.proved:
        yield "  without proof"
    if row.raised:
        yield f"  raises {row.raised}"
    if row.no_output:
        yield f"  no outputs: {row.no_output}"
    if row.output:
        numbers = " ".join(f"{number:.5e}" for number in row.output.numbers)
        yield f"  {row.output.values} outputs {numbers}"
    yield from (f"  {verdict}" for _, verdict in sorted(pairs(row), key=_order))


def pairs(row: Verdicts) -> list[tuple[str, str]]:
    """Return each pair's last module, which a flipped verdict does not change, and its verdict."""
    fused = [(modules[-1], f"fused {rule} {' + '.join(modules)}") for rule, modules in row.fused]
    skipped = [(modules[-1], f"skipped {' + '.join(modules)}") for modules in row.skipped]
    return [*fused, *skipped]


def _order(pair: tuple[str, str]) -> tuple[list[tuple[int, str]], str]:
    """Return what sorts layer2 before layer10."""
    parts = re.split(r"(\d+)", pair[0])
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts], pair[1]


class Table(NamedTuple):
    """One file of the table."""

    rows: dict[str, Verdicts]  # by name
    versions: str  # of the packages it was written with; empty if there is no file yet


def parse(path: Path) -> Table:
    """Return what `text` wrote to a file; nothing if there is none."""
    if not path.exists():
        return Table({}, "")
    lines = path.read_text(encoding="utf-8").splitlines()
    versions = lines[1].removeprefix("# With ").removesuffix(".")
    rows: dict[str, Verdicts] = {}
    name = ""
    for number, line in enumerate(lines[2:], 3):
        try:
            if line.startswith("  "):
                rows[name] = _with(rows[name], line[2:])
            elif line:
                name = line
                rows[name] = Verdicts(name, "")
        except (ValueError, KeyError):
            raise SystemExit(
                f"{path}:{number} is no line of a table of verdicts: {line!r}. Take the file from "
                "git again, or write it with --write."
            ) from None
    return Table(rows, versions)


def _with(row: Verdicts, line: str) -> Verdicts:
    kind, rest = line.split(" ", 1)
    if kind == "on":
        return replace(row, inputs=rest)
    if kind == "without":
        return replace(row, proved=False)
    if kind == "raises":
        return replace(row, raised=rest)
    if kind == "no":
        return replace(row, no_output=rest.removeprefix("outputs: "))
    if kind == "fused":
        rule, modules = rest.split(" ", 1)
        return replace(row, fused=(*row.fused, (rule, tuple(modules.split(" + ")))))
    if kind == "skipped":
        return replace(row, skipped=(*row.skipped, tuple(rest.split(" + "))))
    _, norm, first, second = rest.split(" ")
    return replace(row, output=Digest(int(kind), (float(norm), float(first), float(second))))


def differences(before: Verdicts | None, after: Verdicts | None) -> list[str]:
    """Return what changed in one row, one line each: "layer1.bn1: fused … → skipped …"."""
    if before is None or after is None:
        return ["is not in the table"] if before is None else ["is in the table only"]
    found = [
        f"{what}: {was or '–'} → {now or '–'}"
        for what, was, now in (
            ("inputs", before.inputs, after.inputs),
            ("raises", before.raised, after.raised),
            ("proof", *("" if row.proved else "without" for row in (before, after))),
            ("outputs", before.no_output, after.no_output),
        )
        if was != now
    ]
    if before.output and after.output and not before.output.agrees(after.output):
        found.append(f"outputs: {_shown(before.output)} → {_shown(after.output)}")
    old, new = _by_module(before), _by_module(after)
    for module in dict.fromkeys((*old, *new)):
        was, now = old.get(module, ["–"]), new.get(module, ["–"])
        if was != now:
            found.append(f"{module}: {', '.join(was)} → {', '.join(now)}")
    return found


def _by_module(row: Verdicts) -> dict[str, list[str]]:
    ordered = sorted(pairs(row), key=_order)
    groups = itertools.groupby(ordered, key=lambda pair: pair[0])
    return {module: [verdict for _, verdict in group] for module, group in groups}


def _shown(output: Digest) -> str:
    return f"{output.values} values, {' '.join(f'{number:.5e}' for number in output.numbers)}"


def merged(before: Verdicts | None, after: Verdicts) -> Verdicts:
    """Return `after`, with the digits of `before` where they are of the same outputs.

    Other processors round otherwise: what did not change shall not show in the diff.
    """
    if before and before.output and after.output and before.output.agrees(after.output):
        return replace(after, output=before.output)
    return after
