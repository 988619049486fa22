"""What a device is doing at one moment, read by its own shell."""

import re
import shlex
from dataclasses import replace

from torchfuse.devices.transport import Transport
from torchfuse.runner.machine_state import FILES, MachineState, state_from

__all__ = ["state_of"]

_MARK = "==> "
_PROCESSES = "proc/[0-9]*/stat"


def state_of(transport: Transport) -> MachineState:
    """Return what the device is doing; None for what its shell may not read.

    How much of the load is ours is not told: the processes of a runner come and go.
    """
    patterns = " ".join(f"/{pattern}" for pattern in FILES if pattern != _PROCESSES)
    script = (
        f"for f in {patterns} /proc/$$/status /proc/$$/cgroup; do\n"
        f"  [ -r $f ] && echo && echo {shlex.quote(_MARK)}$f && cat $f 2>/dev/null\n"
        "done\necho\n"
        f"echo {shlex.quote(_MARK)}pid; echo $$"
    )
    files: dict[str, str] = {}
    for block in transport.shell(script).stdout.split(f"\n{_MARK}"):
        name, _, text = block.partition("\n")
        files[name.removeprefix(_MARK).lstrip("/")] = text
    pid = files.pop("pid", "0").strip()
    try:
        state = state_from(files, int(pid) if re.fullmatch(r"\d{1,9}", pid) else 0)
    except (ValueError, IndexError, ArithmeticError):  # no /proc that Linux writes
        return MachineState()
    return replace(state, own_cpu_s=None)
