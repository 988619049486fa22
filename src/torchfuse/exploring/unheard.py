"""What runs on made-up answers is not heard: its prints and logs are about no real input."""

from __future__ import annotations

import io
import logging
import sys
import threading
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["unheard"]


# What is put back is the process's: two threads that did it at once would put back each other's.
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def unheard() -> Iterator[None]:
    """A context without output, warnings and log records, in which nobody can be asked anything.

    (`if x.isnan().any(): breakpoint()`: a debugger finds the end of its input, and quits.)
    """
    with _ONE_AT_A_TIME, _silenced():
        yield


@contextmanager
def _silenced() -> Iterator[None]:
    answers, disabled, trace = sys.stdin, logging.root.manager.disable, sys.gettrace()
    sys.stdin = io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with (
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # the user has seen them in the recorded run
            yield
    finally:
        sys.stdin = answers
        logging.disable(disabled)
        if sys.gettrace() is not trace:
            sys.settrace(trace)
