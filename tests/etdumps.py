"""ETDump files as a runner with ExecuTorch's event tracer writes them.

The wheel's runtime is built without the tracer, so no run of it writes one. These are made with
ExecuTorch's own schema and serializer (executorch.devtools.etdump), of events that a test chooses;
and with ExecuTorch's own writer, which is in the wheel with nobody to call it: the test does.
"""

import ctypes
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchfuse.quieting import quiet

with quiet():
    from executorch.devtools.etdump.schema_flatcc import ETDumpFlatCC, Event, ProfileEvent, RunData
    from executorch.devtools.etdump.serialize import serialize_to_etdump_flatcc

# name, instruction, start, end, and what names an operator inside a delegate
Logged = tuple[str | None, int, int, int] | tuple[str | None, int, int, int, str | int]

LOADING: tuple[Logged, ...] = (
    ("Method::init", -1, 0, 700),
    ("Program::load_method", -1, 0, 900),
)


def write_etdump(path: Path, runs: Sequence[Sequence[Logged]]) -> Path:
    """Write the file of a program that was loaded, and run with these events; return its path."""
    blocks = [("Default", LOADING), *(("Execute", run) for run in runs)]
    dump = ETDumpFlatCC(
        0, [RunData(name, -1, [], [_event(*e) for e in events]) for name, events in blocks]
    )
    with quiet():
        data = serialize_to_etdump_flatcc(dump)
    path.write_bytes(struct.pack("<I", len(data)) + data)  # flatcc puts the size before it
    return path


def _event(
    name: str | None, instruction: int, start: int, end: int, in_delegate: str | int | None = None
) -> Event:
    number = in_delegate if isinstance(in_delegate, int) else -1
    text = in_delegate if isinstance(in_delegate, str) else None
    chain = -1 if instruction < 0 else 0
    return Event(ProfileEvent(name, chain, instruction, number, text, None, start, end), None, None)


class _Entry(ctypes.Structure):
    """executorch::runtime::EventTracerEntry."""

    _fields_ = (
        ("event_id", ctypes.c_int64),
        ("chain_id", ctypes.c_int32),
        ("debug_handle", ctypes.c_uint32),
        ("start_time", ctypes.c_uint64),
        ("delegate_event_id_type", ctypes.c_int),
    )


class _Result(ctypes.Structure):
    """executorch::etdump::ETDumpResult."""

    _fields_ = (("buf", ctypes.c_void_p), ("size", ctypes.c_size_t))


class Writer:
    """ExecuTorch's own writer, executorch::etdump::ETDumpGen, driven as its runtime drives it."""

    def __init__(self) -> None:
        with quiet():
            from executorch.extension.pybindings import _portable_lib
        self._library = ctypes.CDLL(_portable_lib.__file__)
        self._this = ctypes.create_string_buffer(4096)  # more than it takes
        self._call("C1ENS_7runtime4SpanIhEE", None, None, ctypes.c_size_t(0))

    def _call(self, mangled: str, result: type | None, *arguments: object) -> Any:
        function = self._library[f"_ZN10executorch6etdump9ETDumpGen{mangled}"]
        function.restype = result
        return function(ctypes.byref(self._this), *arguments)

    def block(self, name: str) -> None:
        """Begin what is logged of loading, or of a run."""
        self._call("18create_event_blockEPKc", None, name.encode())

    def instruction(self, number: int) -> None:
        """Say which instruction is at work: fields of the base class, behind its table pointer."""
        struct.pack_into("=iI", self._this, 8, 0, number)

    @contextmanager
    def event(self, name: str) -> Iterator[None]:
        """Log an event that lasts as long as the block."""
        unset = (ctypes.c_int32(-1), ctypes.c_uint32(0))  # the instruction at work
        entry = self._call("15start_profilingEPKcij", _Entry, name.encode(), *unset)
        yield
        self._call("13end_profilingENS_7runtime16EventTracerEntryE", None, entry)

    def inside(self, name: str, start: int, end: int) -> None:
        """Log, as XNNPACK's delegate does, an operator inside it."""
        times = (ctypes.c_uint64(start), ctypes.c_uint64(end))
        nothing = (ctypes.c_void_p(None), ctypes.c_size_t(0))
        unset = ctypes.c_int32(-1)
        self._call(
            "22log_profiling_delegateEPKcimmPKvm", None, name.encode(), unset, *times, *nothing
        )

    def write(self, path: Path) -> Path:
        """Write the file; return its path."""
        result = self._call("15get_etdump_dataEv", _Result)
        path.write_bytes(ctypes.string_at(result.buf, result.size))
        return path
