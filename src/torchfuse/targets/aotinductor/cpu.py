"""The CPU that machine code was made for, and whether another one has its instructions."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["this_cpu", "what_lacks"]

# The flags in /proc/cpuinfo that stand for instructions a compiler may use; of x86, of Arm.
_STARTS = ("avx", "amx", "sse", "ssse", "fma", "bmi", "f16c", "popcnt", "lzcnt", "movbe", "gfni",
           "vaes", "vpclmul", "sha", "asimd", "sve", "sme", "fphp", "bf16", "i8mm")  # fmt: skip


def this_cpu() -> dict[str, Any]:
    """Return this machine's kind of CPU, its name, and the instructions that it has, as data."""
    facts: dict[str, Any] = {"machine": platform.machine(), "name": None, "instructions": None}
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return facts
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            facts["name"] = value.strip()
        elif key.strip() in ("flags", "Features"):
            facts["instructions"] = sorted(f for f in value.split() if f.startswith(_STARTS))
    return facts


def what_lacks(here: Mapping[str, Any], made_for: Mapping[str, Any]) -> str | None:
    """Return what code made for one CPU may need that another lacks; None: nothing is known of.

    >>> what_lacks({"machine": "aarch64"}, {"machine": "x86_64"})
    'it was compiled for x86_64, and this is aarch64'
    """
    wanted = made_for.get("machine", here["machine"])
    if wanted != here["machine"]:
        return f"it was compiled for {wanted}, and this is {here['machine']}"
    have, needed = here.get("instructions"), made_for.get("instructions")
    if have is None or needed is None:
        return None
    missing = [name for name in needed if name not in have]
    if not missing:
        return None
    return (
        f"it was compiled for {made_for.get('name') or 'another CPU'} with {', '.join(missing)}, "
        f"which {here.get('name') or 'this CPU'} has not"
    )
