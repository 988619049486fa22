"""What every runner does on a device: models and inputs there, outputs back, rounds of times."""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from torchfuse.devices.record import Record
from torchfuse.devices.transport import Transport
from torchfuse.errors import UnsupportedError
from torchfuse.measuring.tasks import Task
from torchfuse.operator_times import Profile

__all__ = ["OnRound", "Outputs", "Runner", "Schedule", "model_name", "push_models", "tensor_of"]

Outputs = tuple[torch.Tensor, ...]
OnRound = Callable[[Record], object]


@dataclass(frozen=True)
class Schedule:
    """How often each model is called."""

    runs: int  # timed, in all
    warmup: int | None  # None: until the times settle, or as the runner has it
    timeout_s: float  # of everything together


class Runner(abc.ABC):
    """Runs models on a device. Every method raises DeviceError when the device does not do it."""

    @abc.abstractmethod
    def push(self, transport: Transport, tasks: Mapping[str, Task]) -> None:
        """Push the runner, the models and their inputs."""

    @abc.abstractmethod
    def outputs(
        self, transport: Transport, tasks: Mapping[str, Task], record: Record
    ) -> dict[str, Outputs]:
        """Run each model once on the device; return its outputs there."""

    @abc.abstractmethod
    def time(
        self,
        transport: Transport,
        tasks: Mapping[str, Task],
        record: Record,
        schedule: Schedule,
        on_round: OnRound,
    ) -> None:
        """Have the models timed in rounds; the record takes what is told as it comes."""

    def profile(
        self, transport: Transport, tasks: Mapping[str, Task], record: Record, timeout_s: float
    ) -> tuple[Profile, ...]:
        """Return where the time goes in each model.

        Raises:
            UnsupportedError: this runner does not say.
        """
        del tasks, record, timeout_s
        raise UnsupportedError(
            f"{transport.name}: only an executor_runner built with ExecuTorch's event tracer says "
            "where the time goes on a device; give it with --runner, or leave out --profile."
        )


def model_name(index: int, task: Task) -> str:
    """Return the name that a model has on the device: one of ours, whatever the file is called."""
    return f"{index}.{task.form}"


def push_models(transport: Transport, tasks: Mapping[str, Task]) -> None:
    """Push the models and their inputs, each input once."""
    for index, task in enumerate(tasks.values()):
        transport.push(task.path, model_name(index, task))
    inputs = {name: task.folder / name for task in tasks.values() for name in task.input_files}
    for name, path in inputs.items():
        transport.push(path, name)


def tensor_of(data: bytes, dtype: str, shape: list[int]) -> torch.Tensor:
    """Return the tensor whose values these bytes are, in row-major order."""
    kind = getattr(torch, dtype)
    if not data:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(bytearray(data), dtype=kind).reshape(shape)
