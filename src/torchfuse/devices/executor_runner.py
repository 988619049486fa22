"""ExecuTorch's own executor_runner as a runner, for `.pte`.

Source: examples/portable/executor_runner/executor_runner.cpp of ExecuTorch 1.4. What it logs goes
to stderr on Linux, and to the system's log on Android.
"""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchfuse.devices.device_runner import Outputs, model_name, tensor_of
from torchfuse.devices.native import (
    LONGEST_CHECK_S,
    RUNNER,
    NativeModel,
    NativeRunner,
    models,
    raise_if_it_failed,
)
from torchfuse.devices.record import Record
from torchfuse.devices.transport import Transport, last_line
from torchfuse.errors import DeviceError, InputError
from torchfuse.measuring.tasks import Task
from torchfuse.operator_times import Profile
from torchfuse.targets.executorch.etdump import profile_of_etdump

__all__ = ["ExecutorRunner"]

_PROFILED = 10  # runs in a profile
_ITERATION = re.compile(r"Iteration (\d+) of (\d+): ([0-9.]+) ms")
_LOADED = re.compile(r"Model loaded in ([0-9.]+) ms")


class ExecutorRunner(NativeRunner):
    """The user's executor_runner."""

    program = "executor_runner"

    def _check_inputs(self, name: str, task: Task) -> None:
        if not all(isinstance(arg, dict) and "file" in arg for arg in task.args):
            raise InputError(
                f"{name} takes inputs that are not tensors, which executor_runner cannot be given; "
                "measure it with the Python runner, without --runner."
            )

    def _first_run(
        self, transport: Transport, model: NativeModel
    ) -> tuple[Mapping[str, Any], Outputs]:
        words = [*self._words(model, 1), f"--output_file=output-{model.index}"]
        log = self._run(transport, words, model.name, LONGEST_CHECK_S)
        (first_s,) = _iterations_s(transport, log, model.name, 1)
        loaded_ms = _LOADED.search(log)
        loaded = {
            "load_s": float(loaded_ms[1]) / 1e3 if loaded_ms else None,
            "first_inference_s": first_s,
            "threads": model.threads,
            "can_set_threads": True,
        }
        return loaded, tuple(_pulled(transport, model.index, model.task))

    def _turn(
        self, transport: Transport, model: NativeModel, untimed: int, timed: int, left_s: float
    ) -> Sequence[float]:
        calls = untimed + timed
        log = self._run(transport, self._words(model, calls), model.name, left_s)
        return _iterations_s(transport, log, model.name, calls)[untimed:]

    def profile(
        self, transport: Transport, tasks: Mapping[str, Task], record: Record, timeout_s: float
    ) -> tuple[Profile, ...]:
        """Run each model once more, and read the ETDump that a runner with a tracer writes."""
        profiles = []
        with tempfile.TemporaryDirectory() as folder:
            for model in models(tasks, record):
                words = [*self._words(model, _PROFILED), "--etdump_path=etdump"]
                self._run(transport, words, model.name, timeout_s)
                target = Path(folder) / f"{model.index}.etdump"
                transport.pull("etdump", target)
                profiles.append(profile_of_etdump(target, name=model.name))
        return tuple(profiles)

    def _words(self, model: NativeModel, executions: int) -> list[str]:
        inputs = ",".join(arg["file"] for arg in model.task.args)
        return [
            f"./{RUNNER}",
            f"--model_path={model_name(model.index, model.task)}",
            *([f"--inputs={inputs}"] if inputs else []),
            f"--num_executions={executions}",
            f"--cpu_threads={model.threads}",
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
