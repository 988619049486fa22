"""Where the time of a program's runs goes, by the file that ExecuTorch's event tracer writes.

Kernels inside of delegates are included. A runner built with the tracer writes such an ETDump on a
device, too.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torchfuse.errors import ArtifactError, first_line
from torchfuse.operator_times import Key, Profile, profile_of

__all__ = ["profile_of_etdump"]

THE_REST = "(the runtime itself)"

# What ExecuTorch's runtime calls the parts of a run. A call holds the kernel's or the delegate's
# own events, where they log any.
_RUN = "Method::execute"
_CALLS = ("OPERATOR_CALL", "DELEGATE_CALL")
_KERNEL = "native_call_"


def profile_of_etdump(
    etdump: str | os.PathLike[str],
    *,
    etrecord: str | os.PathLike[str] | None = None,
    name: str | None = None,
    ticks_per_s: float = 1e9,
    skip: int = 0,
) -> Profile:
    """Return where the time goes in the runs that an ETDump file tells of.

    A runner built with ExecuTorch's event tracer writes it (`executor_runner --etdump_path`). An
    `etrecord`, which ExecuTorch writes when it exports with `generate_etrecord=True`, adds the
    delegates' names and the operators of what has no name of its own. `ticks_per_s` is the speed
    of the device's clock, 1e9 on Linux and Android. The first `skip` runs, which warm up, are left
    out.

    Raises:
        ArtifactError: a file is missing, damaged, or tells of no run.
    """
    blocks = _event_blocks(etdump, etrecord)
    ticks: dict[Key, float] = defaultdict(float)
    calls: dict[Key, int] = defaultdict(int)
    runs, all_ticks = 0, 0.0
    for block in blocks:
        timed = [event for event in block.events if event.perf_data is not None]
        whole = [event.perf_data.raw[skip:] for event in timed if event.name == _RUN]
        if not whole:  # loading, not running
            continue
        runs += len(whole[0])
        all_ticks += sum(map(sum, whole))
        for event in _innermost(timed):
            key = _key(event)
            ticks[key] += sum(event.perf_data.raw[skip:])
            calls[key] += len(event.perf_data.raw[skip:])
    if not runs:
        raise ArtifactError(
            f"Expected the events of at least one run in '{etdump}', got none; the runner must be "
            "built with -DEXECUTORCH_ENABLE_EVENT_TRACER=ON, and have run the program."
        )
    rest = (THE_REST, False, None)
    ticks[rest] = max(0.0, all_ticks - sum(ticks.values()))
    calls[rest] = runs
    seconds = {key: value / ticks_per_s for key, value in ticks.items()}
    return profile_of(name or os.path.basename(etdump), seconds, calls, runs, "ETDump")


def _event_blocks(
    etdump: str | os.PathLike[str], etrecord: str | os.PathLike[str] | None
) -> list[Any]:
    for path in (etdump, etrecord):
        if path is not None and not Path(path).is_file():
            raise ArtifactError(f"Expected a file at '{path}', found none.")
    import warnings

    from torchfuse.isolation.warning_filters import known_warnings_ignored

    with known_warnings_ignored(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Output Buffer not found")  # intermediate results
        from executorch.devtools import Inspector
        from executorch.devtools.inspector import TimeScale

        # In ticks both ways: it scales what a delegate logged otherwise than the rest.
        try:
            inspector = Inspector(
                etdump_path=os.fspath(etdump),
                etrecord=None if etrecord is None else os.fspath(etrecord),
                source_time_scale=TimeScale.CYCLES,
                target_time_scale=TimeScale.CYCLES,
            )
        except Exception as error:
            raise ArtifactError(
                f"ExecuTorch's Inspector cannot read '{etdump}'"
                f"{'' if etrecord is None else f' with {str(etrecord)!r}'}: {first_line(error)}; "
                "take files that the same version of ExecuTorch wrote, whole."
            ) from error
    return list(inspector.event_blocks)


def _innermost(events: list[Any]) -> Iterable[Any]:
    """Return the events of kernels and inside delegates, and calls with nothing logged inside."""
    inside = [event for event in events if event.is_delegated_op or event.name.startswith(_KERNEL)]
    explained = {event._instruction_id for event in inside}
    return inside + [
        event for event in events if event.name in _CALLS and event._instruction_id not in explained
    ]


def _key(event: Any) -> Key:
    delegate = event.delegate_backend_name or None
    if event.name.startswith(_KERNEL):
        return event.name.removeprefix(_KERNEL), False, None
    operators = ", ".join(event.op_types)
    if not event.is_delegated_op:
        in_delegate = event.name == "DELEGATE_CALL"
        return operators or event.name, in_delegate, delegate
    if isinstance(event.delegate_debug_identifier, str):
        # XNNPACK counts calls of the same kernel: "Convolution (NHWC, F32) IGEMM #3".
        return re.sub(r" #\d+$", "", event.delegate_debug_identifier), True, delegate
    return operators or f"operator {event.delegate_debug_identifier}", True, delegate
