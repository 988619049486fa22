"""What runs on this machine, whatever process it is in: any number of builds, or one measurement.

Locks of the kernel's on files of this machine: of a process that is killed they are let go, and
two suites at once on the same machine respect each other too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Turn", "machine_name"]

# Not tempfile's: TMPDIR may differ between the processes of one machine.
_FOLDER = Path("/tmp")  # noqa: S108  # it holds no secret, and is opened for reading only


def machine_name() -> str:
    """Return what results call this machine."""
    return socket.gethostname()


class Turn:
    """What a job has of its machine: a block of it runs beside others' builds, another one alone.

    Whoever waits to run alone keeps others from beginning, so that it gets its turn: they pass
    through a gate, which it closes.
    """

    def __init__(self, folder: Path = _FOLDER) -> None:
        self.folder = folder
        self._held: int | None = None
        self._waited_s = 0.0
        self._waits_since_s: float | None = None

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Run beside others that do."""
        self._take(fcntl.LOCK_SH)
        try:
            yield
        finally:
            self._let_go()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Run while nobody else does."""
        self._take(fcntl.LOCK_EX)
        try:
            yield
        finally:
            self._let_go()

    @contextlib.contextmanager
    def on_device(self, name: str) -> Iterator[None]:
        """Have a device to oneself, of all processes of this machine, and run beside builds."""
        plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
        device = _opened(self.folder / f"torchfuse-device-{plain}.lock")
        try:
            with self._waiting():
                fcntl.flock(device, fcntl.LOCK_EX)
            with self.beside():
                yield
        finally:
            os.close(device)

    def let_others(self) -> None:
        """Give way to whoever waits to run alone: between two steps of a block beside others."""
        self._let_go()
        self._take(fcntl.LOCK_SH)

    def waited_s(self) -> float:
        """Return how long it has waited for others until now."""
        since_s = self._waits_since_s
        return self._waited_s + (0.0 if since_s is None else time.monotonic() - since_s)

    def _take(self, how: int) -> None:
        gate = _opened(self.folder / "torchfuse-machine.gate")
        machine = _opened(self.folder / "torchfuse-machine.lock")
        try:
            with self._waiting():
                fcntl.flock(gate, how)
                fcntl.flock(machine, how)
        except BaseException:
            os.close(machine)
            raise
        finally:
            os.close(gate)  # with it, its lock
        self._held = machine

    def _let_go(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        self._waits_since_s = time.monotonic()
        try:
            yield
        finally:
            self._waited_s, self._waits_since_s = self.waited_s(), None


def _opened(path: Path) -> int:
    """Open a file to lock it; whoever came first made it, and may be another user."""
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
