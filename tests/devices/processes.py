"""Servers that tests start: where they listen, that they are up, and that nothing of them stays."""

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found", bound=Collection[int])


def dying_with_us() -> list[str]:
    """A command before a command that ends it when this process ends, where there is one."""
    found = shutil.which("setpriv")
    return [found, "--pdeathsig", "KILL"] if found else []


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


def wait_until_open(port: int, process: subprocess.Popen[bytes], timeout_s: float = 20) -> None:
    """Returns once something listens there; raises if the process that should has ended."""
    end = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"nothing listens on port {port}; status {process.poll()}")
        time.sleep(0.01)


def marked(mark: str) -> list[int]:
    """The processes with NAME=VALUE in the environment that they were started with."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def lasting(find: Callable[[], Found]) -> Found:
    """What still runs a second later, if anything: a process that is killed takes its time."""
    end = time.monotonic() + 1
    while (found := find()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that these started."""
    parents: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in parentheses, may have spaces in it.
            parent = int(file.read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(file.parent.name))
    found: list[int] = []
    left = [pid]
    while left:
        children = parents.get(left.pop(), [])
        found += children
        left += children
    return found


def kill(pids: list[int]) -> None:
    """Ends processes, and returns once they have ended; that they had before is no error."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                select.select([handle], [], [], 10)
            finally:
                os.close(handle)
