"""Code of torchfuse in a Python of its own: the command, and the environment that it needs."""

import os
import sys

__all__ = ["ONE_THREAD", "command_for", "environment"]

# Libraries read these when they are loaded. A process that has threads cannot be forked safely;
# a runtime's own threads are set later.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def command_for(module: str, function: str, *arguments: str) -> list[str]:
    """Return the command that calls a function of ours with these arguments.

    Not `-m`, which looks in the current folder first: a file that came with a model, say json.py,
    would be run.
    """
    code = (
        "import sys; sys.path[:] = filter(None, sys.path); "
        f"from {module} import {function}; {function}(*sys.argv[1:])"
    )
    return [sys.executable, "-c", code, *arguments]


def environment() -> dict[str, str]:
    """Return this process's environment, with what it imports from."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
