"""A device's Python that runs torchfuse's runner, and does something of its own amid it."""

from collections.abc import Callable
from pathlib import Path

_SCRIPT = """#!{python}
import os, sys, time
sys.path.insert(0, sys.argv[1])
import torchfuse.runner.__main__ as runner
from torchfuse.runner.job import event, read_event
whole = runner._printed
def printed(line):
    told = read_event(line)
{body}
runner._printed = printed
sys.exit(runner.main(sys.argv[2:]))
"""


def python_that(folder: Path, python: Path, body: str) -> Path:
    """A Python that, for each line that the runner prints, does `body` (four spaces deep)."""
    program = folder / "odd python"
    # Not a #! line: the path of a Python may have spaces in it, or be a script's.
    script = folder / "odd.py"
    script.write_text(_SCRIPT.format(python=python, body=body))
    program.write_text(f'#!/bin/sh\nexec "{python}" "{script}" "$@"\n')
    program.chmod(0o755)
    return program


def pausing_python(folder: Path, python: Path, after: str) -> tuple[Path, Callable[[], list[Path]]]:
    """A Python that pauses after a line with this in it; what gives a file for each that does."""
    reached = folder / "reached"
    body = f"""\
    whole(line)
    if {after!r} in line:
        open({str(reached)!r} + "." + str(os.getpid()), "w").close()
        time.sleep(1000)
"""
    return python_that(folder, python, body), lambda: list(folder.glob("reached.*"))
