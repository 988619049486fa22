"""What runners of the user's own have in common: a process of its own for each turn of a model."""

import abc
import math
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torchfuse.devices.device_runner import OnRound, Outputs, Runner, Schedule, push_models
from torchfuse.devices.record import Record
from torchfuse.devices.state import state_of
from torchfuse.devices.transport import Finished, Transport, last_line
from torchfuse.errors import DeviceError
from torchfuse.measuring.tasks import Task
from torchfuse.runner.loop import interleave

__all__ = [
    "LONGEST_CHECK_S",
    "RUNNER",
    "NativeModel",
    "NativeRunner",
    "models",
    "raise_if_it_failed",
]

RUNNER = "runner"  # the name of the binary on the device
LONGEST_CHECK_S = 300.0

_ROUNDS = 15  # at least, where there are enough runs
_FEWEST_TIMED = 5  # in a process, whose start takes longer than they do
_WARMUP = 10  # a process that has just begun is slow for a few calls

# untimed calls, timed calls, seconds left → seconds of each timed call
Turn = Callable[[int, int, float], Sequence[float]]


@dataclass(frozen=True, eq=False)
class NativeModel:
    """One model of a run, and how it is run."""

    index: int
    name: str
    task: Task
    threads: int


class NativeRunner(Runner):
    """A binary of the user's own, started anew for each turn."""

    program: str  # what it is

    def __init__(self, path: Path) -> None:
        self._path = path

    @abc.abstractmethod
    def _check_inputs(self, name: str, task: Task) -> None:
        """Raise InputError if the binary cannot be given the task's inputs."""

    @abc.abstractmethod
    def _first_run(
        self, transport: Transport, model: NativeModel
    ) -> tuple[Mapping[str, Any], Outputs]:
        """Return what a `loaded` event tells of the model, and its outputs."""

    @abc.abstractmethod
    def _turn(
        self, transport: Transport, model: NativeModel, untimed: int, timed: int, left_s: float
    ) -> Sequence[float]:
        """Return the seconds of each of the timed calls."""

    def push(self, transport: Transport, tasks: Mapping[str, Task]) -> None:
        """Push the runner, the models and their inputs."""
        for name, task in tasks.items():
            self._check_inputs(name, task)
        transport.push(self._path, RUNNER)
        transport.shell(f"chmod 700 {shlex.quote(f'{transport.folder}/{RUNNER}')}")
        push_models(transport, tasks)

    def outputs(
        self, transport: Transport, tasks: Mapping[str, Task], record: Record
    ) -> dict[str, Outputs]:
        """Run each model once on the device; return its outputs there."""
        outputs = {}
        for model in models(tasks, record):
            loaded, outputs[model.name] = self._first_run(transport, model)
            event = {"kind": "loaded", "artifact": model.index, "idle_memory_bytes": None}
            record.note(event | dict(loaded))
        record.note(
            {
                "kind": "runtime",
                "name": self.program,
                "version": None,
                "debug_build": False,
                "operators": [],
            }
        )
        return outputs

    def time(
        self,
        transport: Transport,
        tasks: Mapping[str, Task],
        record: Record,
        schedule: Schedule,
        on_round: OnRound,
    ) -> None:
        """Have the models timed in rounds; the record takes what is told as it comes."""
        turns = {
            model.name: partial(self._turn, transport, model) for model in models(tasks, record)
        }
        _time_in_rounds(transport, turns, record, schedule, on_round)


def models(tasks: Mapping[str, Task], record: Record) -> list[NativeModel]:
    """Return the models of a run, in their order."""
    return [
        NativeModel(index, name, task, record.threads)
        for index, (name, task) in enumerate(tasks.items())
    ]


def _time_in_rounds(
    transport: Transport,
    turns: Mapping[str, Turn],
    record: Record,
    schedule: Schedule,
    on_round: OnRound,
) -> None:
    """Have every model take its turns; the record takes the times round by round.

    Raises:
        DeviceError: a turn failed, or all together took too long.
    """
    timed = min(schedule.runs, max(_FEWEST_TIMED, math.ceil(schedule.runs / _ROUNDS)))
    untimed = _WARMUP if schedule.warmup is None else schedule.warmup
    deadline = time.monotonic() + schedule.timeout_s

    def before_deadline(turn: Turn) -> Callable[[int, int], Sequence[float]]:
        def taken(untimed: int, timed: int) -> Sequence[float]:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise DeviceError(
                    f"{transport.name}: the rounds took longer than the {schedule.timeout_s:g} s "
                    "of --timeout; give it more, or fewer runs (--iter)."
                )
            return turn(untimed, timed, left_s)

        return taken

    bounded = {name: before_deadline(turn) for name, turn in turns.items()}
    done_before = record.runs_before // timed
    for index in range(len(turns)):
        # Each process warms up for itself; how well shows in the spread.
        warm = {"kind": "warm", "artifact": index, "warmup_runs": untimed, "settled": None}
        record.note(warm)
    record.note_state(state_of(transport))
    for done, rounds, samples_s in interleave(
        bounded, schedule.runs, 0, done_before, (untimed, timed)
    ):
        record.note(
            {
                "kind": "round",
                "done": done,
                "rounds": rounds,
                "turn_runs": timed,
                "samples_s": {str(index): times for index, times in enumerate(samples_s.values())},
            }
        )
        on_round(record)
    record.note_state(state_of(transport))


def raise_if_it_failed(transport: Transport, finished: Finished, log: str, name: str) -> None:
    """Raise what a runner's status and words mean.

    Raises:
        DeviceError: it could not be started, crashed, or refused the model.
    """
    if finished.status == 0:
        return
    unknown = re.search(r"unknown command line flag '(\w+)'", log)
    if unknown and unknown[1] == "etdump_path":
        raise DeviceError(
            f"{transport.name}: the runner keeps no profile; build it with "
            "-DEXECUTORCH_BUILD_DEVTOOLS=ON -DEXECUTORCH_ENABLE_EVENT_TRACER=ON."
        )
    if unknown:
        raise DeviceError(
            f"{transport.name}: the runner does not know --{unknown[1]}; build the one of "
            "ExecuTorch 1.4."
        )
    if finished.status in (126, 127):
        raise DeviceError(
            f"{transport.name}: the runner cannot be started there "
            f"({last_line(finished.stderr) or 'no reason given'}); it must be built for that "
            "processor and system, with the libraries that it needs in it, and lie in a folder "
            "that allows programs (--device-folder)."
        )
    raise DeviceError(
        f"{transport.name}: the runner ended {finished.how} on {name}: "
        f"{last_line(log) or 'no message'}."
    )
