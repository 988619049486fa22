"""ExecuTorch's own executor_runner as a runner, for `.pte`.

Source: examples/portable/executor_runner/executor_runner.cpp of ExecuTorch 1.4. What it logs goes
to stderr on Linux, and to the system's log on Android.
"""

import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torchfuse.devices.native_rounds import time_in_rounds
from torchfuse.devices.record import Record
from torchfuse.devices.runner import (
    OnRound,
    Outputs,
    Runner,
    Schedule,
    model_name,
    push_models,
    tensor_of,
)
from torchfuse.devices.transport import Finished, Transport, last_line
from torchfuse.errors import DeviceError, InputError
from torchfuse.profiling import Profile, profile_of_etdump
from torchfuse.tasks import Task

__all__ = ["ExecutorRunner", "raise_if_it_failed"]

_NAME = "runner"
_LONGEST_CHECK_S = 300.0
_PROFILED = 10  # runs in a profile
_ITERATION = re.compile(r"Iteration (\d+) of (\d+): ([0-9.]+) ms")
_LOADED = re.compile(r"Model loaded in ([0-9.]+) ms")


class ExecutorRunner(Runner):
    """The user's executor_runner."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def push(self, transport: Transport, tasks: Mapping[str, Task]) -> None:
        """Push the runner, the models and their inputs."""
        for name, task in tasks.items():
            if not all(isinstance(arg, dict) and "file" in arg for arg in task.args):
                raise InputError(
                    f"{name} takes inputs that are not tensors, which executor_runner cannot be "
                    "given; measure it with the Python runner, without --runner."
                )
        transport.push(self._path, _NAME)
        transport.shell(f"chmod 700 {shlex.quote(f'{transport.folder}/{_NAME}')}")
        push_models(transport, tasks)

    def outputs(
        self, transport: Transport, tasks: Mapping[str, Task], record: Record
    ) -> dict[str, Outputs]:
        """Run each model once on the device; return its outputs there."""
        outputs = {}
        for index, (name, task) in enumerate(tasks.items()):
            words = [*self._words(index, task, record.threads, 1), f"--output_file=output-{index}"]
            log = self._run(transport, words, name, _LONGEST_CHECK_S)
            times_s = _iterations_s(transport, log, name, 1)
            loaded_ms = _LOADED.search(log)
            record.note(
                {
                    "kind": "loaded",
                    "artifact": index,
                    "load_s": float(loaded_ms[1]) / 1e3 if loaded_ms else None,
                    "first_inference_s": times_s[0],
                    "idle_memory_bytes": None,
                    "threads": record.threads,
                    "can_set_threads": True,
                }
            )
            outputs[name] = tuple(_pulled(transport, index, task))
        record.note(
            {
                "kind": "runtime",
                "name": "executor_runner",
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

        def turn(
            index: int, name: str, task: Task, untimed: int, timed: int, left_s: float
        ) -> Sequence[float]:
            words = self._words(index, task, record.threads, untimed + timed)
            log = self._run(transport, words, name, left_s)
            return _iterations_s(transport, log, name, untimed + timed)[untimed:]

        turns = {
            name: partial(turn, index, name, task)
            for index, (name, task) in enumerate(tasks.items())
        }
        time_in_rounds(transport, turns, record, schedule, on_round)

    def profile(
        self, transport: Transport, tasks: Mapping[str, Task], record: Record, timeout_s: float
    ) -> tuple[Profile, ...]:
        """Run each model once more, and read the ETDump that a runner with a tracer writes."""
        profiles = []
        with tempfile.TemporaryDirectory() as folder:
            for index, (name, task) in enumerate(tasks.items()):
                words = self._words(index, task, record.threads, _PROFILED)
                self._run(transport, [*words, "--etdump_path=etdump"], name, timeout_s)
                target = Path(folder) / f"{index}.etdump"
                transport.pull("etdump", target)
                profiles.append(profile_of_etdump(target, name=name))
        return tuple(profiles)

    def _words(self, index: int, task: Task, threads: int, executions: int) -> list[str]:
        inputs = ",".join(arg["file"] for arg in task.args)
        return [
            f"./{_NAME}",
            f"--model_path={model_name(index, task)}",
            *([f"--inputs={inputs}"] if inputs else []),
            f"--num_executions={executions}",
            f"--cpu_threads={threads}",
            "--print_output=none",
        ]

    def _run(self, transport: Transport, words: list[str], name: str, timeout_s: float) -> str:
        """Run it to its end; return what it logged, wherever that went."""
        clock = transport.shell("date +'%m-%d %H:%M:%S.000'").stdout.strip()
        finished = transport.run(words, timeout_s=timeout_s)
        log = f"{finished.stdout}\n{finished.stderr}"
        if not _ITERATION.search(log):
            logcat = f"logcat -d -v raw -T '{clock}' -s ExecuTorch:V 2>/dev/null"
            log += transport.shell(logcat).stdout
        raise_if_it_failed(transport, finished, log, name)
        return log


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


def _iterations_s(transport: Transport, log: str, name: str, count: int) -> list[float]:
    found = _ITERATION.findall(log)[-count:]
    if [int(number) for number, _, _ in found] != list(range(1, count + 1)):
        raise DeviceError(
            f"{transport.name}: expected 'Iteration 1 of {count}: … ms' and so on from the runner "
            f"on {name}, got {len(found)} such lines, and as its last '{last_line(log)}'; build "
            "the executor_runner of ExecuTorch 1.4, with logging (EXECUTORCH_ENABLE_LOGGING=ON)."
        )
    return [float(milliseconds) / 1e3 for _, _, milliseconds in found]


def _pulled(transport: Transport, index: int, task: Task) -> list[Any]:
    outputs = []
    with tempfile.TemporaryDirectory() as folder:
        for number, expected in enumerate(task.expected):
            target = Path(folder) / f"{number}.bin"
            transport.pull(f"output-{index}-{number}.bin", target)
            data, size = target.read_bytes(), expected.numel() * expected.element_size()
            if len(data) != size:
                raise DeviceError(
                    f"{transport.name}: output {number} of {task.path.name} has {len(data):,} "
                    f"bytes there, and {size:,} here."
                )
            dtype = str(expected.dtype).removeprefix("torch.")
            outputs.append(tensor_of(data, dtype, list(expected.shape)))
    return outputs
