"""Models measured on a device: pushed, compared with this machine's outputs, and then timed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from torchfuse.devices.device_runner import Runner, Schedule
from torchfuse.devices.facts import DeviceFacts, facts_of
from torchfuse.devices.native_runner import native_runner
from torchfuse.devices.operators import operators_of
from torchfuse.devices.python_runner import PythonRunner
from torchfuse.devices.record import ArtifactName, Record
from torchfuse.devices.run import DeviceRun
from torchfuse.devices.transport import Transport
from torchfuse.errors import DeviceError, TorchfuseError
from torchfuse.measuring.tasks import Task
from torchfuse.measuring.timing import Measurement, round_id_of
from torchfuse.verifying.equivalence import Equivalence
from torchfuse.verifying.outputs import compare_outputs

if TYPE_CHECKING:
    from torchfuse.operator_times import Profile

__all__ = ["Settings", "bench_on"]

# Another machine's kernels round otherwise, and a quantized net multiplies that: below these,
# something is wrong and not just rounded. Any other file is compared by the tolerance of its
# outputs' type.
_MIN_SQNR_DB = {"fp16": 30.0, "int8": 20.0, "int4": 20.0}


@dataclass(frozen=True)
class Settings:
    """How models are measured, on every device alike."""

    runs: int = 50
    warmup: int | None = None
    threads: int = 1
    timeout_s: float = 600.0
    runner: Path | None = None  # the user's own binary; None: torchfuse's Python runner
    python: str = "python3"
    profile: bool = False  # also find out where the time goes


def bench_on(
    transport: Transport,
    tasks: Mapping[str, Task],
    settings: Settings,
    *,
    earlier: Mapping[str, Measurement] | None = None,
    on_step: Callable[[str], object] = lambda _: None,
    on_partial: Callable[[DeviceRun], object] = lambda _: None,
) -> DeviceRun:
    """Return what was measured on the device; an error that ended it early is in the result.

    `earlier` is what an interrupted run measured of the same files; its rounds are not repeated.
    """
    record = Record(
        [ArtifactName(name, task.size_bytes, task.sha256) for name, task in tasks.items()],
        settings.threads,
        round_id=round_id_of(earlier or {}),
        earlier=earlier or {},
    )
    differences: dict[str, Equivalence] = {}
    facts = DeviceFacts(transport.name, "unknown")
    profiles: tuple[Profile, ...] = ()

    def so_far(error: str | None = None) -> DeviceRun:
        return DeviceRun(
            facts,
            record.runner,
            record.measurements,
            record.cautions(emulated=facts.emulated),
            tuple(differences.items()),
            profiles,
            error,
        )

    def note_round(_: Record) -> None:
        on_step(f"round {record.rounds[0]} of {record.rounds[1]}")
        on_partial(so_far())

    try:
        on_step("connecting")
        with transport:
            facts = facts_of(transport)
            runner = _runner(settings, tasks, facts)
            on_step("pushing")
            runner.push(transport, tasks)
            on_step("comparing outputs with this machine's")
            outputs = runner.outputs(transport, tasks, record)
            for name, task in tasks.items():
                differences[name] = _compared(task, outputs[name])
            _require_equal(transport, differences)
            on_step("warming up")
            schedule = Schedule(settings.runs, settings.warmup, settings.timeout_s)
            runner.time(transport, tasks, record, schedule, note_round)
            if settings.profile:
                on_step("profiling")
                profiles = runner.profile(transport, tasks, record, settings.timeout_s)
    except TorchfuseError as error:
        notes = " ".join(getattr(error, "__notes__", ()))
        return so_far(f"{error} {notes}".strip())
    except OSError as error:  # of a file of ours: what goes wrong there is a DeviceError
        reason = error.strerror or error
        return so_far(
            f"{transport.name}: a temporary file cannot be written here ({reason}); set TMPDIR "
            "to a folder with room."
        )
    return so_far()


def _runner(settings: Settings, tasks: Mapping[str, Task], facts: DeviceFacts) -> Runner:
    if settings.runner is None:
        return PythonRunner(settings.python)
    return native_runner(settings.runner, tasks, facts)


def _compared(task: Task, outputs: tuple[torch.Tensor, ...]) -> Equivalence:
    """Return how far the device's outputs are from this machine's."""
    many = len(task.expected) > 1
    names = [f"output {i}" if many else "output" for i in range(len(task.expected))]
    min_sqnr_db = _MIN_SQNR_DB.get(_precision(task))
    found = compare_outputs(
        dict(zip(names, task.expected, strict=True)),
        dict(zip(names, outputs, strict=True)),
        min_sqnr_db=min_sqnr_db,
    )
    return Equivalence(tuple(found), min_sqnr_db)


def _precision(task: Task) -> str:
    """Return the precision that is noted in the file, or that its operators tell."""
    noted: str | None = task.metadata.get("precision")
    if noted is None:
        quantized = any(name.startswith("quantized") for name in operators_of(task))
        return "int8" if quantized else "unknown"
    return noted


def _require_equal(transport: Transport, differences: Mapping[str, Equivalence]) -> None:
    for name, difference in differences.items():
        if not difference.passed:
            raise DeviceError(
                f"{transport.name}: {name} computes something else there than here: "
                f"{' '.join(difference.problems)} Nothing was timed; see whether the runtime there "
                "is of the version that the file was made for, and whether an emulator computes "
                "right."
            )
