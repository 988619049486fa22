"""Known noise of torch, torchao and ExecuTorch, silenced by its message and its origin.

Only what is listed here is dropped. Any other warning, log record or line comes through.
"""

import contextlib
import io
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

__all__ = ["known_warnings_ignored", "runtime_logs_captured"]


@dataclass(frozen=True)
class _NoisyWarning:
    message: str  # regular expressions, matched from the start
    module: str
    category: type[Warning]


_WARNINGS = (
    # torch.export deep-copies its own pytree specs
    _NoisyWarning(r"`isinstance\(treespec, LeafSpec\)` is deprecated", r"copyreg", FutureWarning),
    # torch.export, of torch's own recurrent layers
    _NoisyWarning(
        r"The tensor attributes self\.\S*_flat_weights\[.* were assigned during export",
        r"contextlib",
        UserWarning,
    ),
    # executorch reads its schemas with the functions that Python 3.11 deprecates
    _NoisyWarning(
        r"(read|open)_(text|binary) is deprecated",
        r"executorch\.(exir|devtools)\.",
        DeprecationWarning,
    ),
    _NoisyWarning(r"open_text is deprecated", r"importlib\.resources", DeprecationWarning),
    # the legacy target is about nothing else than what is deprecated
    _NoisyWarning(r"torch\.ao\.quantization is deprecated", r"", DeprecationWarning),
    _NoisyWarning(r"Lite Interpreter is deprecated", r"", DeprecationWarning),
    _NoisyWarning(r"`torch\.jit\.\w+` is (deprecated|not supported)", r"", DeprecationWarning),
    _NoisyWarning(r"torch\.quantize_per_tensor, .* are deprecated", r"torch", UserWarning),
    _NoisyWarning(r"Please use quant_min and quant_max", r"torch\.ao\.", UserWarning),
    # importing ExecuTorch's runtime
    _NoisyWarning(r"This API is experimental", r"executorch\.extension\.pybindings", Warning),
)

# logger → the messages that are dropped
_RECORDS = {
    "torchao": r"Failed to load .*\.so",  # kernels for graphics cards
    "torchao.kernel.intmm": r"Warning: Detected no triton",
    "torch.utils._pytree": r"<enum 'KernelPreference'> is an Enum subclass",
}

# What ExecuTorch's runtime and the libraries inside it write to file descriptor 2.
_RUNTIME_LINES = re.compile(
    r"\[(cpuinfo_utils|threadpool|cpuinfo)\.cpp:\d+\]|Error in cpuinfo: "
    r"|USDT:.*\] profiler_(start|stop)"  # torch's profiler
)


class _Drop(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return re.match(_RECORDS[record.name], record.getMessage()) is None


@contextlib.contextmanager
def known_warnings_ignored() -> Iterator[None]:
    """Drop the listed warnings and log records while exporting, quantizing or loading."""
    drop = _Drop()
    loggers = [logging.getLogger(name) for name in _RECORDS]
    with warnings.catch_warnings():
        for noise in _WARNINGS:
            warnings.filterwarnings("ignore", noise.message, noise.category, noise.module)
        for logger in loggers:
            logger.addFilter(drop)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(drop)


def _anonymous_file() -> BinaryIO:
    if hasattr(os, "memfd_create"):  # in memory: a fiftieth of the time
        return open(os.memfd_create("stderr"), "w+b", buffering=0)
    return tempfile.TemporaryFile()


@contextlib.contextmanager
def runtime_logs_captured() -> Iterator[list[str]]:
    """Drop the listed lines that ExecuTorch's runtime writes to stderr.

    Everything else that was written meanwhile is in the list at the end, and on stderr, unless an
    exception ends the block: then the list says more than the exception does.
    """
    lines: list[str] = []
    sys.stderr.flush()
    # Its bindings send some of it to Python's stderr, the rest goes to the file descriptor.
    to_python, descriptor = io.StringIO(), os.dup(2)
    with _anonymous_file() as to_descriptor, contextlib.redirect_stderr(to_python):
        os.dup2(to_descriptor.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(descriptor, 2)
            os.close(descriptor)
            to_descriptor.seek(0)
            written = to_descriptor.read().decode(errors="replace") + to_python.getvalue()
            lines += [line for line in written.splitlines() if not _RUNTIME_LINES.match(line)]
    for line in lines:
        print(line, file=sys.stderr)
