"""ETDump files of events that a test chooses, as ExecuTorch's event tracer would write them.

They are made with ExecuTorch's own schema and serializer (executorch.devtools.etdump).
"""

import struct
from collections.abc import Sequence
from pathlib import Path

from torchfuse.isolation.warning_filters import known_warnings_ignored

with known_warnings_ignored():
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
    with known_warnings_ignored():
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
