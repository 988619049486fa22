"""Runs the blocks of the README and the docs as tests: docs/blocks.py says how."""

import difflib
import runpy
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import torch
from click.testing import CliRunner
from sybil import Example

from blocks import masked, sybil
from torchfuse import cli
from torchfuse.measuring import speed_benchmark

# Two threads on two busy cores take ten times as long for models this small.
torch.set_num_threads(1)


def run(words: list[str], status: int) -> str:
    """Return what a command prints on stdout, or, if nothing, on stderr; in this process."""
    program, *arguments = words
    with (
        CliRunner().isolation() as (out, err, _),
        patch.object(sys, "argv", arguments if program == "python" else words),
        patch.object(sys, "path", [*sys.path]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # nobody looks at them here
        ended: object = 0
        try:
            if program == "torchfuse":
                cli.main()
            elif program == "speed_benchmark_torch":
                ended = speed_benchmark.main(arguments)
            else:
                assert program == "python", f"mark it with skip: no test runs {program!r}"
                sys.path.insert(0, str(Path(arguments[0]).parent))
                runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as error:
            ended = error.code or 0
        sys.stdout.flush()
        printed, told = out.getvalue().decode(), err.getvalue().decode()
    assert ended == status, f"{words} ended with {ended}:\n{told}"
    return printed or told


def compare(example: Example, printed: str) -> str | None:
    """Return how what was printed differs from what the page shows, but for figures of one run."""
    shown = str(example.parsed)
    if masked(shown) == masked(printed):
        return None
    lines = difflib.unified_diff(shown.splitlines(), printed.splitlines(), "shown", "printed")
    return "\n".join(["python docs/generate.py mends it:", *lines])


# Scripts, which have no doctests.
collect_ignore_glob = ["docs/*.py", "examples/*.py"]
pytest_collect_file = sybil(run, compare).pytest()
