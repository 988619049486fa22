"""The command: a job that torchfuse made, or models named on the command line."""

import argparse
import contextlib
import hashlib
import json
import secrets
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchfuse.runner.allocator import keep_freed_memory
from torchfuse.runner.job import event, read_event, run_job


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a job, or measure the models named on the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description="Measure .pte files on this machine, without torchfuse and without torch."
    )
    parser.add_argument(
        "models", nargs="*", help="files to compare (.pte; .pt and .ptl with torch)"
    )
    parser.add_argument("--job", help="a job that torchfuse made, instead of models")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE[:TYPE]",
        help="an input of ones, such as 1x3x224x224 or 1x16:int64; repeat for several",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of the runtime (1)")
    parser.add_argument("--runs", type=int, default=50, help="timed calls of each model (50)")
    parser.add_argument("--warmup", type=int, help="untimed calls before (until times settle)")
    parser.add_argument(
        "--save", help="a file for everything measured, which `torchfuse bench --read` compares"
    )
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    keep_freed_memory()
    try:
        if given.job is not None:
            job = json.loads(Path(given.job).read_text())
            run_job(job, Path(given.job).resolve().parent, _printed)
            return 0
        if not given.models:
            parser.error("expected the names of .pte files")
        for name in ("runs", "threads"):
            if getattr(given, name) < 1:
                parser.error(f"--{name} must be 1 or more, got {getattr(given, name)}")
        if given.warmup is not None and given.warmup < 0:
            parser.error(f"--warmup must be 0 or more, got {given.warmup}")
        return _measure_named(given)
    except (RuntimeError, OSError, ValueError) as error:
        print(f"runner.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        saved = "" if given.save is None else f"; '{given.save}' holds the rounds until then"
        print(f"runner.py: interrupted{saved}", file=sys.stderr)
        return 130


def _printed(line: str) -> None:
    print(line, flush=True)


def _measure_named(given: argparse.Namespace) -> int:
    inputs = [_input(text) for text in given.input]
    names = [Path(name) for name in given.models]
    job = {
        "artifacts": [
            {
                "path": str(path.resolve()),
                "name": str(path),
                "form": path.suffix[1:],
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "size_bytes": path.stat().st_size,
                "args": inputs,
                "kwargs": {},
            }
            for path in names
        ],
        "threads": given.threads,
        "runs": given.runs,
        "warmup": given.warmup,
        "seed": 0,
        "done": 0,
    }
    lines: list[str] = []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())  # for the outputs
        saved = None
        if given.save is not None:  # line by line, so that what ends it early leaves the rest
            saved = stack.enter_context(Path(given.save).open("w"))

        def tell(line: str) -> None:
            lines.append(line)
            if saved is not None:
                print(line, file=saved, flush=True)

        tell(event(kind="job", **job, round_id=secrets.token_hex(8)))
        run_job(job, Path(folder), tell)
    events = [entry for entry in map(read_event, lines) if entry is not None]
    failed = [entry for entry in events if entry["kind"] == "failed"]
    for entry in failed:
        print(f"runner.py: error: {names[entry['artifact']]}: {entry['reason']}", file=sys.stderr)
    rounds = [entry["samples_s"] for entry in events if entry["kind"] == "round"]
    for index, name in enumerate(names):
        samples_s = [s for turn in rounds for s in turn.get(str(index), [])]
        if len(samples_s) > 1:
            low, middle, high = statistics.quantiles(samples_s, n=4, method="inclusive")
            print(
                f"{name}: {middle * 1e3:.4g} ms (IQR {(high - low) * 1e3:.2g} ms), "
                f"{len(samples_s)} runs, threads: {given.threads}"
            )
    return 1 if failed else 0


def _input(text: str) -> dict[str, Any]:
    shape, _, dtype = text.partition(":")
    try:
        sizes = [int(size) for size in shape.split("x")]
    except ValueError:
        raise ValueError(
            f"expected an input such as 1x3x224x224 or 1x16:int64, got '{text}'"
        ) from None
    return {"ones": sizes, "dtype": dtype or "float32"}


if __name__ == "__main__":
    sys.exit(main())
