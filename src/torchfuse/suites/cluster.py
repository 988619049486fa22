"""The Dask cluster that a suite runs on: one that runs already, or this machine's own."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torchfuse.errors import InputError, UnsupportedError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import Client

__all__ = ["cluster", "require_dask"]

_CONNECT_S = 10
_WORKER_BYTES = 2 * 1024**3  # what a worker may need: torch, a model, its copies and its file
# The sampling of workers' stacks, and an allocator that gives memory back at once (which Dask sets
# in the environment of its workers), would be in the times.
_CONFIG: dict[str, Any] = {
    "distributed.worker.profile.enabled": False,
    "distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": 1, "MKL_NUM_THREADS": 1},
}


def require_dask() -> None:
    """Find out, before any work, whether suites can be run here.

    Raises:
        UnsupportedError: Dask distributed is not installed.
    """
    if find_spec("distributed") is None:
        raise UnsupportedError(
            "A suite takes Dask distributed, which is not installed: pip install 'torchfuse[dask]'."
        )


@contextlib.contextmanager
def cluster(scheduler: str | None, workers: int | None = None) -> Iterator[Client]:
    """Connect to a scheduler's address, or start `workers` here (None: as many as memory allows).

    Raises:
        InputError: there is no scheduler at the address.
    """
    import dask
    from distributed import Client, LocalCluster

    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=_CONNECT_S, name="torchfuse")
        except (OSError, ValueError, TypeError) as error:  # no answer, or no address
            raise InputError(
                f"There is no Dask scheduler at '{scheduler}': {first_line(error)}; start one "
                "with 'dask scheduler' and give the address that it prints."
            ) from error
        with client:
            yield client
        return
    count, limit_bytes = _fitting(workers)
    with dask.config.set(_CONFIG), _without_interrupt():
        here = LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            host="127.0.0.1",
            memory_limit=limit_bytes,
            dashboard_address="127.0.0.1:0",  # which takes bokeh
            silence_logs=logging.CRITICAL,
        )
        client = Client(here)
    try:
        yield client
    finally:
        with _without_interrupt():  # a second Ctrl-C would leave processes behind
            client.close()
            here.close()


def _fitting(workers: int | None) -> tuple[int, int]:
    """Return how many workers there are to be on this machine, and the memory of each in bytes."""
    import psutil
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT

    free_bytes = min(psutil.virtual_memory().available, MEMORY_LIMIT)
    count = workers or max(1, min(CPU_COUNT, free_bytes // _WORKER_BYTES))
    return count, free_bytes // count


@contextlib.contextmanager
def _without_interrupt() -> Iterator[None]:
    """Have processes that are started ignore Ctrl-C, which a terminal sends to them as well."""
    if threading.current_thread() is not threading.main_thread():  # no signal comes to it
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
