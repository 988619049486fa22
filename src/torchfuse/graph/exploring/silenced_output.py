"""What runs on made-up answers is not heard: its prints and logs are about no real input.

Nor does it change anything outside: where it would write a file, remove one, start a program or
open a connection, that raises an error, with which the path ends.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["output_silenced"]


# What is put back is the process's: two threads that did it at once would put back each other's.
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def output_silenced() -> Iterator[None]:
    """A context without output, warnings and log records, in which nobody can be asked anything.

    (`if x.isnan().any(): breakpoint()`: a debugger finds the end of its input, and quits.)
    """
    with _ONE_AT_A_TIME, _silenced(), _kept_from_outside():
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


# Events that Python tells an audit hook, of what lasts after the process.
_LASTING = frozenset(
    {
        *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"),
        *("os.chmod", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen"),
        *("shutil.rmtree", "shutil.move", "shutil.copyfile", "socket.connect", "socket.sendto"),
        *("sqlite3.connect", "webbrowser.open"),
    }
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC
_kept = threading.local()
_hooked = False


class _OutsideError(OSError):
    """Ends a path that would change something outside."""


@contextmanager
def _kept_from_outside() -> Iterator[None]:
    global _hooked
    if not _hooked:  # for good: Python takes no hook away again
        _hooked = True
        sys.addaudithook(_audit)
    save, torch.save = torch.save, _refuse  # which writes without Python's knowledge
    before, _kept.here = getattr(_kept, "here", False), True
    try:
        yield
    finally:
        _kept.here = before
        torch.save = save


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not getattr(_kept, "here", False):
        return
    if event in _LASTING or (event == "open" and _writes(*args[1:])):
        _refuse(event)


def _writes(mode: Any, flags: Any) -> bool:
    """Whether a file is opened to be written (the mode is None where `os.open` is called)."""
    if isinstance(mode, str):
        return bool({*mode} & {*"wxa+"})
    return isinstance(flags, int) and bool(flags & _WRITING)


def _refuse(*_: object, **__: object) -> None:
    raise _OutsideError("What is run to see what it does changes nothing outside.")
