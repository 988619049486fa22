"""Memory that a call has freed stays this process's, so that the next call need not get it anew."""

import contextlib
import os

__all__ = ["keep_freed_memory"]

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER_TRIMMED = 2**30


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, here and in processes that are forked from here.

    Else it gives large blocks back and maps them anew in each call, or does not, by what lies
    beside them: the same file takes twice as long in one process of ten. That is no property of
    the file. Settings of the user's own (MALLOC_…, GLIBC_TUNABLES) stay as they are; other
    allocators are left alone.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with contextlib.suppress(ValueError, OSError, AttributeError, ImportError):
        import ctypes  # which a board's Python may lack

        if os.confstr("CS_GNU_LIBC_VERSION"):  # ValueError: another C library
            library = ctypes.CDLL(None)
            library.mallopt(_MMAP_MAX, 0)
            library.mallopt(_TRIM_THRESHOLD, _NEVER_TRIMMED)
