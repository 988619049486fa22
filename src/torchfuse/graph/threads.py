"""Notices when a model hands work to another thread, or memory to another library."""

from __future__ import annotations

import _thread
import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.utils.dlpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["handing_over"]


@contextmanager
def handing_over(
    to_thread: Callable[[], None], to_library: Callable[[torch.Tensor], None]
) -> Iterator[None]:
    """A context in which `to_thread()` and `to_library(tensor)` are called as that happens.

    Only what this thread does counts. It wraps the entry points, as Python offers no other way to
    see it; a signal to a thread that nothing waits for is none.
    """
    thread = threading.get_ident()

    def starting(function: Any) -> Any:
        def handed_over(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                to_thread()
            return function(*args, **kwargs)

        return handed_over

    def notifying(notify: Any) -> Any:
        def handed_over(self: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread and self._waiters:
                to_thread()
            return notify(self, *args, **kwargs)

        return handed_over

    def exporting(function: Any) -> Any:
        def handed_over(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                to_library(tensor)
            return function(tensor, *args, **kwargs)

        return handed_over

    entries: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (threading.Thread, "start", starting),
        (_thread, "start_new_thread", starting),
        (ThreadPoolExecutor, "submit", starting),
        (queue.Queue, "put", starting),
        (threading.Condition, "notify", notifying),  # events, semaphores and barriers use it
        (torch.utils.dlpack, "to_dlpack", exporting),
        (torch._C, "_to_dlpack", exporting),
    ]
    if (pools := sys.modules.get("multiprocessing.pool")) is not None:
        names = ("apply_async", "_map_async", "imap", "imap_unordered")
        entries += [(pools.Pool, name, starting) for name in names]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in entries]
    for (owner, name, wrapped), (_, _, function) in zip(entries, originals, strict=True):
        setattr(owner, name, wrapped(function))
    try:
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)
