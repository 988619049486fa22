"""What a long command is doing, on stderr: a status line, or a line per step where it is piped."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator

from rich.console import Console

__all__ = ["progress"]


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yield what to call with a description before each step."""
    if sys.stderr.isatty():
        with Console(stderr=True, markup=False).status("starting") as status:
            yield status.update
        return
    last = ""

    def line(step: str) -> None:
        nonlocal last
        kind = re.sub(r"\b\d+ of \d+", "", step)  # "round 3 of 50" once, not fifty times
        if kind != last:
            print(step, file=sys.stderr)
        last = kind

    yield line
