"""PyTorch's own speed_benchmark_torch as a runner, for `.ptl` and `.pt`.

Source: binaries/speed_benchmark_torch.cc of PyTorch 1.13. It makes its own inputs, which are ones,
and has no flag for threads.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from torchfuse.devices.device_runner import Outputs, model_name
from torchfuse.devices.native import (
    LONGEST_CHECK_S,
    RUNNER,
    NativeModel,
    NativeRunner,
    raise_if_it_failed,
)
from torchfuse.devices.transport import Transport, last_line
from torchfuse.errors import DeviceError, InputError
from torchfuse.measuring.tasks import Task

__all__ = ["SpeedBenchmark"]

_TYPES = {"float32": "float", "uint8": "uint8_t", "int64": "int64"}
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|inf|nan)(?![\w.])")


class SpeedBenchmark(NativeRunner):
    """The user's speed_benchmark_torch."""

    program = "speed_benchmark_torch"

    def _check_inputs(self, name: str, task: Task) -> None:
        _inputs(name, task)

    def _first_run(
        self, transport: Transport, model: NativeModel
    ) -> tuple[Mapping[str, Any], Outputs]:
        words = [*self._words(model, 0, 1), "--print_output=true"]
        printed = self._run(transport, words, model.name, LONGEST_CHECK_S)
        shown, found, rest = printed.partition("Starting benchmark.")
        if not found:
            raise _garbage(transport, model.name, printed)
        _times_s(transport, model.name, rest, 1)
        loaded = {
            "load_s": None,
            "first_inference_s": None,  # its output was printed by a call before
            "threads": None,
            "can_set_threads": False,
        }
        return loaded, _as_printed(transport, model.name, model.task, shown)

    def _turn(
        self, transport: Transport, model: NativeModel, untimed: int, timed: int, left_s: float
    ) -> Sequence[float]:
        printed = self._run(transport, self._words(model, untimed, timed), model.name, left_s)
        return _times_s(transport, model.name, printed, timed)

    def _words(self, model: NativeModel, warmup: int, runs: int) -> list[str]:
        return [
            f"./{RUNNER}",
            f"--model={model_name(model.index, model.task)}",
            *_inputs(model.name, model.task),
            f"--warmup={warmup}",
            f"--iter={runs}",
            "--report_pep=true",
        ]

    def _run(self, transport: Transport, words: list[str], name: str, timeout_s: float) -> str:
        finished = transport.run(words, timeout_s=timeout_s)
        raise_if_it_failed(transport, finished, f"{finished.stdout}\n{finished.stderr}", name)
        return finished.stdout


def _inputs(name: str, task: Task) -> list[str]:
    """Return the flags that make the tool's inputs those of the task.

    Raises:
        InputError: it cannot make them.
    """
    if not task.args and not task.kwargs:
        return ["--no_inputs=true"]
    described = []
    for arg in task.args:
        if not _is_ones(task, arg) or task.kwargs:
            raise InputError(
                f"{name} was to be measured on inputs that speed_benchmark_torch cannot make: it "
                "makes ones, of type float, uint8_t or int64; give --input_dims and --input_type."
            )
        channels_last = len(arg["shape"]) == 4 and arg["strides"] != _contiguous(arg["shape"])
        described.append(
            (
                ",".join(map(str, arg["shape"])),
                _TYPES[arg["dtype"]],
                "channels_last" if channels_last else "contiguous_format",
            )
        )
    dims, types, formats = zip(*described, strict=True)
    return [
        f"--input_dims={';'.join(dims)}",
        f"--input_type={';'.join(types)}",
        f"--input_memory_format={';'.join(formats)}",
    ]


def _contiguous(shape: list[int]) -> list[int]:
    return list(torch.empty(shape, device="meta").stride())


def _is_ones(task: Task, arg: Any) -> bool:
    if not isinstance(arg, dict) or arg.get("dtype") not in _TYPES:
        return False
    data = bytearray((task.folder / arg["file"]).read_bytes())
    if not data:
        return True
    return bool((torch.frombuffer(data, dtype=getattr(torch, arg["dtype"])) == 1).all())


def _times_s(transport: Transport, name: str, printed: str, count: int) -> list[float]:
    times_s = []
    for line in printed.splitlines():
        if line.startswith("PyTorchObserver "):
            try:
                times_s.append(float(json.loads(line.removeprefix("PyTorchObserver "))["value"]))
            except (ValueError, KeyError, TypeError):
                raise _garbage(transport, name, line) from None
    if len(times_s) != count or "Main run finished." not in printed:
        raise _garbage(transport, name, printed)
    return [microseconds / 1e6 for microseconds in times_s]


def _garbage(transport: Transport, name: str, printed: str) -> DeviceError:
    return DeviceError(
        f"{transport.name}: expected what speed_benchmark_torch prints from the runner on {name}, "
        f"got as its last line '{last_line(printed)}'; see that it is that tool."
    )


def _as_printed(transport: Transport, name: str, task: Task, shown: str) -> Outputs:
    """Return the output that the tool prints, to five digits.

    Raises:
        DeviceError: it prints something else than as many values as there are here.
        InputError: there are several outputs, whose print nobody can take apart.
    """
    if len(task.expected) != 1:
        raise InputError(
            f"{name} returns {len(task.expected)} tensors; what speed_benchmark_torch prints of "
            "more than one cannot be compared. Measure it as a .pte."
        )
    expected = task.expected[0]
    values = _printed_values(shown)
    if len(values) != expected.numel():
        raise _garbage(transport, name, shown)
    return (torch.from_numpy(values).reshape(expected.shape).to(expected.dtype),)


def _printed_values(text: str) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    r"""Return the values of a tensor as C++ prints it, in row-major order.

    It prints a matrix in blocks of columns where lines would be too long, more dimensions as
    matrices one after the other, and a factor in front where the values are large or small.

    >>> _printed_values("Columns 1 to 2 1  2\n 4  5\n\nColumns 3 to 3 3\n 6\n[ CPUFloatType{2,3}")
    array([1., 2., 3., 4., 5., 6.])
    """
    matrices: list[list[list[list[float]]]] = [[[]]]  # matrix, block of columns, row, value
    factor = 1.0
    for line in text.splitlines():
        scale = re.fullmatch(r"\s*([\d.e+-]+)\s+\*\s*", line)
        columns = re.match(r"\s*Columns\s+\d+\s+(?:to|and)\s+\d+", line)
        if _TYPE.match(line):
            break
        if scale:
            factor = float(scale[1])
            continue
        if _MATRIX.match(line):
            if matrices[-1] != [[]]:
                matrices.append([[]])
            continue
        if columns:
            line = line[columns.end() :]
            if matrices[-1][-1]:
                matrices[-1].append([])
        numbers = [factor * float(number) for number in _NUMBER.findall(line)]
        if numbers:
            matrices[-1][-1].append(numbers)
    try:
        return np.concatenate([np.hstack(blocks).ravel() for blocks in matrices])
    except ValueError:  # rows of unequal lengths: no tensor
        return np.empty(0)


_TYPE = re.compile(r"\s*\[ \w+Type\{")
_MATRIX = re.compile(r"\s*\(\d+(?:,\d+)*,\.,\.\) =")
