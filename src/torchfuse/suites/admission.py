"""Which workers a suite uses: those that would make of the same content the same file."""

from __future__ import annotations

import platform
import signal
import threading
from dataclasses import dataclass
from typing import Any

from torchfuse.comparing.cache import makers
from torchfuse.suites.machine import machine_name
from torchfuse.suites.store import is_seen

__all__ = ["Admitted", "Asked", "admit", "versions_here"]


@dataclass(frozen=True)
class Asked:
    """What a worker must have, and what it is given: plain."""

    versions: dict[str, str | None]  # of the machine that asks
    store: str  # the cache's folder or URL
    mark: str  # what is to be seen in it
    resource: str  # the name of the Dask resource that jobs of the suite need
    more: dict[str, float]  # other resources that it is given, where they are ours to give
    is_ours: bool  # it was started for this suite, on this machine


@dataclass(frozen=True)
class Admitted:
    """What a worker is: plain."""

    machine: str
    refused: str | None  # why, as the end of a sentence


def versions_here() -> dict[str, str | None]:
    """Return the versions of all that makes files, and of Python; None: it is not installed."""
    return {"Python": platform.python_version(), **makers()}


async def admit(dask_worker: Any, asked: Asked) -> Admitted:
    """Look at the worker that this runs in; give it the resource that jobs need, if it fits."""
    refused = _refused(dask_worker, asked)
    if refused is None:
        if asked.is_ours and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asked
        await dask_worker.set_resources(**{asked.resource: 1.0, **asked.more})
    return Admitted(machine_name(), refused)


def _refused(dask_worker: Any, asked: Asked) -> str | None:
    here = versions_here()
    differing = [
        f"{name} {here.get(name) or 'not installed'} (here it is {wanted or 'not installed'})"
        for name, wanted in asked.versions.items()
        if here.get(name) != wanted
    ]
    if differing:
        return f"it has {', '.join(differing)}"
    threads = dask_worker.state.nthreads
    if threads != 1:
        return f"it has {threads} threads; start it with --nthreads 1, and more of them"
    if not is_seen(asked.store, asked.mark):
        return f"it does not see the cache '{asked.store}', a folder or URL that all must see"
    return None
