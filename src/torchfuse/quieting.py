"""Known noise of torch, torchao and ExecuTorch, silenced by its message and its origin.

Only what is listed here is dropped. Any other warning, log record or line comes through.
"""

import contextlib
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["quiet", "quiet_runtime"]


@dataclass(frozen=True)
class _NoisyWarning:
    message: str  # regular expressions, matched from the start
    module: str
    category: type[Warning]


_WARNINGS = (
    # torch.export deep-copies its own pytree specs
    _NoisyWarning(r"`isinstance\(treespec, LeafSpec\)` is deprecated", r"copyreg", FutureWarning),
    # executorch reads its schemas with the functions that Python 3.11 deprecates
    _NoisyWarning(
        r"(read|open)_(text|binary) is deprecated", r"executorch\.exir\.", DeprecationWarning
    ),
    _NoisyWarning(r"open_text is deprecated", r"importlib\.resources", DeprecationWarning),
    # the legacy target is about nothing else than what is deprecated
    _NoisyWarning(r"torch\.ao\.quantization is deprecated", r"", DeprecationWarning),
    _NoisyWarning(r"Lite Interpreter is deprecated", r"", DeprecationWarning),
    _NoisyWarning(r"`torch\.jit\.\w+` is (deprecated|not supported)", r"", DeprecationWarning),
    _NoisyWarning(r"torch\.quantize_per_tensor, .* are deprecated", r"torch\.", UserWarning),
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
_RUNTIME_LINES = re.compile(rb"\[(cpuinfo_utils|threadpool|cpuinfo)\.cpp:\d+\]|Error in cpuinfo: ")


class _Drop(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return re.match(_RECORDS[record.name], record.getMessage()) is None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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


@contextlib.contextmanager
def quiet_runtime() -> Iterator[None]:
    """Drop the listed lines that ExecuTorch's runtime writes to stderr, past Python.

    Everything else that was written meanwhile appears on stderr at the end.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            caught.seek(0)
            for line in caught:
                if not _RUNTIME_LINES.match(line):
                    os.write(2, line)
