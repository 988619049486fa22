"""What a measurement ran on: the processor's name, and whether it has the int8 instructions."""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Machine", "this_machine"]

_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Machine:
    """The processor that figures were measured on."""

    processor: str
    logical_cpus: int
    avx512_vnni: bool | None  # int8 dot products of AVX-512; None: this system does not say


def this_machine(cpuinfo: Path = _CPUINFO) -> Machine:
    """Return the machine this runs on, by the kernel's own description where it gives one."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    return Machine(
        name[1].strip() if name else platform.processor() or platform.machine(),
        os.cpu_count() or 1,
        "avx512_vnni" in flags[1].split() if flags else None,
    )
