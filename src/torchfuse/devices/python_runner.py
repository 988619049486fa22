"""torchfuse's own runner on a device: one archive, which any Python there can run."""

import hashlib
import io
import json
import math
import tempfile
import zipfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from torchfuse.devices.device_runner import (
    OnRound,
    Outputs,
    Runner,
    Schedule,
    model_name,
    push_models,
    tensor_of,
)
from torchfuse.devices.operators import operators_of
from torchfuse.devices.printable import printable
from torchfuse.devices.record import Record
from torchfuse.devices.transport import Finished, Transport, last_line
from torchfuse.errors import DeviceError, UnsupportedError
from torchfuse.measuring.tasks import Task
from torchfuse.runner.interpreter import ONE_THREAD
from torchfuse.runner.loop import turn_length

__all__ = ["PythonRunner", "runner_archive"]

_RUNNER = "runner.pyz"
_MAIN = "import sys\nfrom torchfuse.runner.__main__ import main\nsys.exit(main())\n"
_LONGEST_CHECK_S = 300.0

_ENVIRONMENT = (
    "PYTHONDONTWRITEBYTECODE=1",
    *(f"{name}={value}" for name, value in ONE_THREAD.items()),
)
_START = f'export {" ".join(_ENVIRONMENT)}; exec "$@"'


def runner_archive() -> bytes:
    """Return the runner as an archive that `python3` runs; the same bytes each time."""
    package = files("torchfuse")
    modules = [e.name for e in (package / "runner").iterdir() if e.name.endswith(".py")]
    sources = {"__main__.py": _MAIN, "torchfuse/__init__.py": ""}
    for name in (f"runner/{module}" for module in sorted(modules)):
        sources[f"torchfuse/{name}"] = package.joinpath(*name.split("/")).read_text("utf-8")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as written:
        for name, text in sources.items():
            written.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)
    return archive.getvalue()


class PythonRunner(Runner):
    """The runner of torchfuse, by a Python on the device that has a runtime for the files."""

    def __init__(self, python: str = "python3") -> None:
        self._python = python

    def push(self, transport: Transport, tasks: Mapping[str, Task]) -> None:
        """Push the runner, the models and their inputs."""
        with tempfile.TemporaryDirectory() as folder:
            runner = Path(folder) / _RUNNER
            runner.write_bytes(runner_archive())
            transport.push(runner, _RUNNER)
        push_models(transport, tasks)

    def outputs(
        self, transport: Transport, tasks: Mapping[str, Task], record: Record
    ) -> dict[str, Outputs]:
        """Run each model once on the device; return its outputs there."""
        job = {"runs": 0, "warmup": None, "done": 0}
        self._run(transport, tasks, record, job, _LONGEST_CHECK_S, lambda _: None)
        _require_operators(tasks, record)
        outputs = {}
        with tempfile.TemporaryDirectory() as folder:
            for index, (name, task) in enumerate(tasks.items()):
                all_described = _described_outputs(transport, name, task, record, index)
                pulled = []
                for described in all_described:
                    target = Path(folder) / described["file"]
                    transport.pull(described["file"], target)
                    pulled.append(_tensor(transport, target.read_bytes(), described))
                outputs[name] = tuple(pulled)
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
        job = {
            "runs": schedule.runs,
            "warmup": schedule.warmup,
            "done": record.runs_before // turn_length(len(tasks), schedule.runs),
        }
        self._run(transport, tasks, record, job, schedule.timeout_s, on_round)

    def _run(
        self,
        transport: Transport,
        tasks: Mapping[str, Task],
        record: Record,
        job: Mapping[str, Any],
        timeout_s: float,
        on_round: OnRound,
    ) -> None:
        artifacts = [
            {"path": model_name(index, task), **task.artifact}
            for index, task in enumerate(tasks.values())
        ]
        whole = {"artifacts": artifacts, "threads": record.threads, "seed": 0, **job}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "job.json"
            path.write_text(json.dumps(whole))
            transport.push(path, "job.json")

        def came(line: str) -> None:
            try:
                event = record.take(line)
            except ValueError as error:
                raise DeviceError(
                    f"{transport.name}: expected what torchfuse's runner tells, got {error}; see "
                    f"what '{self._python}' is there."
                ) from error
            if event is not None and event["kind"] == "round":
                on_round(record)

        record.ended = False
        # Not `env`, which would take a path with a = in it for one more setting.
        words = ["sh", "-c", _START, "sh", self._python, _RUNNER, "--job", "job.json"]
        finished = transport.run(words, timeout_s=timeout_s, on_line=came)
        if record.failed is not None:
            index, reason = record.failed
            name = list(tasks)[index]
            raise DeviceError(f"{transport.name}: {name} does not run there: {reason}.")
        if not record.ended:
            self._raise_ended_early(transport, finished)

    def _raise_ended_early(self, transport: Transport, finished: Finished) -> None:
        reason = last_line(finished.stderr).removeprefix("runner.py: error: ") or "no message"
        if finished.status == _NOT_FOUND:
            raise DeviceError(
                f"{transport.name}: there is no '{self._python}' there ({reason}); name one with "
                "--device-python, by its whole path if it is not on the PATH, or give a runner of "
                "your own with --runner."
            )
        raise DeviceError(f"{transport.name}: the runner ended {finished.how}: {reason}.")


_NOT_FOUND = 127  # of a shell


def _require_operators(tasks: Mapping[str, Task], record: Record) -> None:
    says = {runtime["form"]: set(runtime["operators"]) for runtime in record.runtimes}
    for name, task in tasks.items():
        have = says.get(task.form)
        missing = sorted(set(operators_of(task)) - have) if have else []
        if missing:
            raise UnsupportedError(
                f"{name} needs {', '.join(missing)}, for which the runtime on the device has no "
                "kernel; install a newer one there, or replace the operator in the model."
            )


def _described_outputs(
    transport: Transport, name: str, task: Task, record: Record, index: int
) -> list[dict[str, Any]]:
    described: list[dict[str, Any]] = record.loaded.get(index, {}).get("outputs", [])
    if len(described) != len(task.expected):
        raise DeviceError(
            f"{transport.name}: {name} returned {len(described)} tensors there, and "
            f"{len(task.expected)} here; see whether the runtime there is of the version that the "
            "file was made for."
        )
    return described


def _tensor(transport: Transport, data: bytes, described: Mapping[str, Any]) -> torch.Tensor:
    if hashlib.sha256(data).hexdigest() != described["sha256"]:
        raise DeviceError(
            f"{transport.name}: an output arrived damaged; check the cable or the connection, and "
            "try again."
        )
    dtype = getattr(torch, described["dtype"], None)
    if not isinstance(dtype, torch.dtype) or (
        math.prod(described["shape"]) * dtype.itemsize != len(data)
    ):
        raise DeviceError(
            f"{transport.name}: an output of {len(data):,} bytes is said to be "
            f"{described['shape']} of {printable(described['dtype'])}, which it cannot be; see "
            "what runs there."
        )
    return tensor_of(data, described["dtype"], described["shape"])
