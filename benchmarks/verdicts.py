"""Which pairs torchfuse.fuse fuses and which it skips, in several hundred models: what changed.

    python benchmarks/verdicts.py                          # compare all with the table
    python benchmarks/verdicts.py --only timm              # a group, or
    python benchmarks/verdicts.py --only layer_norm        # models whose names contain this
    python benchmarks/verdicts.py --write                  # write the table, for git to compare

Ends with status 1 if a verdict is not the table's, if outputs are not, or if a fused model computes
something else than its original in float64, whatever the table says; such a model's row is never
written.
"""

import argparse
import gc
import importlib.util
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from verdict_table import hazards, models
from verdict_table.of_model import Verdicts
from verdict_table.table import Table, differences, merged, parse, text

from torchfuse.artifacts import write_atomically

TABLES = Path(__file__).with_name("verdict_table")
GROUPS = (*models.GROUPS, "hazards")
PACKAGES = {  # whose code these models are
    "torchvision": ("torch", "torchvision"),
    "timm": ("torch", "torchvision", "timm"),
    "coverage": ("torch", "transformers"),
}


class Task(NamedTuple):
    """What one process does at a time: one model, or the hazards of one file of tests."""

    group: str
    name: str


class Outcome(NamedTuple):
    """What came of it."""

    task: Task
    rows: list[Verdicts]
    failed: str  # the traceback, or what pytest printed; empty if nothing failed
    cpu_s: float


def main(arguments: list[str] | None = None) -> int:
    """Compute the verdicts; write or compare them. Return the status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--only", default="", metavar="GROUP|NAME", help=", ".join(GROUPS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder of the table")
    options = parser.parse_args(arguments)
    if not options.tables.is_dir():
        parser.error(f"{options.tables} is no folder; --tables takes the one that holds the table")
    groups = [options.only] if options.only in GROUPS else list(GROUPS)
    wanted = "" if options.only in GROUPS else options.only  # a part of names
    tables = {group: parse(options.tables / f"{group}.txt") for group in groups}
    tasks = list(_tasks(groups, wanted, tables))
    if not tasks:
        parser.error(f"no group, model or test of the table has {wanted!r} in its name")
    needed = dict.fromkeys(name for task in tasks for name in _packages(task.group))
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        parser.error(f"{' and '.join(missing)} must be installed, which `make verdicts` does")

    changed = verdicts = 0
    failed = False
    for group, outcomes in _outcomes(tasks, max(1, options.jobs or 1)):
        table = tables[group]
        rows = {row.name: row for outcome in outcomes for row in outcome.rows}
        rows = {name: row for name, row in rows.items() if wanted in name}
        verdicts += sum(len(row.fused) + len(row.skipped) for row in rows.values())
        lost = tuple(outcome.task.name for outcome in outcomes if outcome.failed)
        compared = [name for name in table.rows if wanted in name and not name.startswith(lost)]
        for name in dict.fromkeys((*compared, *rows)):
            for line in differences(table.rows.get(name), rows.get(name)):
                print(f"{group} {name}: {line}")
                changed += 1
        for outcome in outcomes:
            if outcome.failed:
                print(f"{group} {outcome.task.name} DID NOT RUN\n{outcome.failed}")
        wrong = [row for row in rows.values() if row.wrong]
        for row in wrong:
            print(f"{group} {row.name} IS WRONG ONCE FUSED: {row.wrong}")
        if table.versions not in ("", versions := _versions(group)):
            print(f"{group}: written with {table.versions}, run with {versions}.")
        failed = failed or bool(lost or wrong)
        if options.write:
            bad = {row.name for row in wrong}
            gone = {name for name in compared if name not in rows}
            right = {n: merged(table.rows.get(n), r) for n, r in rows.items() if n not in bad}
            written = {n: r for n, r in {**table.rows, **right}.items() if n not in gone}
            order = {task.name: place for place, task in enumerate(_tasks([group], "", tables))}
            in_order = sorted(
                written.values(), key=lambda row: order.get(_task_of(row), len(order))
            )
            write_atomically(options.tables / f"{group}.txt", text(in_order, versions).encode())
    print(f"{verdicts} verdicts, {changed or 'no'} difference{'s' * (changed != 1)}.")
    return int(failed or (changed > 0 and not options.write))


def _tasks(groups: list[str], wanted: str, tables: dict[str, Table]) -> Iterator[Task]:
    for group in groups:
        if group == "hazards":
            for file in hazards.files():
                names = (file, *(n for n in tables[group].rows if n.startswith(f"{file}::")))
                if any(wanted in name for name in names):
                    yield Task(group, file)
        else:
            names = models.GROUPS[group]()
            yield from (Task(group, name) for name in names if wanted in name)


def _task_of(row: Verdicts) -> str:
    """Return the name of the task that a row comes from: for a hazard, its test's file."""
    return row.name.split("::")[0]


def _packages(group: str) -> tuple[str, ...]:
    return PACKAGES.get(group, ("torch",))


def _versions(group: str) -> str:
    """Return the versions of a group's packages, without what they were built for."""
    return ", ".join(f"{name} {version(name).split('+')[0]}" for name in _packages(group))


def _outcomes(tasks: list[Task], jobs: int) -> Iterator[tuple[str, list[Outcome]]]:
    """Yield each group's outcomes, in the order of the tasks, as soon as it is complete."""
    began = time.perf_counter()
    left = Counter(task.group for task in tasks)
    done: dict[Task, Outcome] = {}
    for number, outcome in enumerate(_unordered(tasks, jobs), 1):
        task = outcome.task
        done[task] = outcome
        print(
            f"[{number}/{len(tasks)}, {time.perf_counter() - began:.0f} s] {task.group} "
            f"{task.name}: {outcome.cpu_s:.1f} s of processor time",
            file=sys.stderr,
            flush=True,
        )
        left[task.group] -= 1
        if not left[task.group]:
            yield task.group, [done[other] for other in tasks if other.group == task.group]


def _unordered(tasks: list[Task], jobs: int) -> Iterator[Outcome]:
    if jobs == 1:
        yield from map(_run, tasks)
        return
    # Each process is a new one: a fork would share the locks of torch's threads.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_run, task) for task in tasks]
        try:
            yield from (future.result() for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)


def _run(task: Task) -> Outcome:
    began = time.process_time()
    rows: list[Verdicts] = []
    torch.set_num_threads(1)
    try:
        if task.group == "hazards":
            rows, failed = hazards.hazards(task.name)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the models' own
                rows, failed = [models.GROUPS[task.group]()[task.name]()], ""
    except Exception:  # noqa: BLE001  # one model that fails must not hide the others
        failed = traceback.format_exc()
    gc.collect()  # the large ones come one after the other
    return Outcome(task, rows, failed, time.process_time() - began)


if __name__ == "__main__":
    sys.exit(main())
