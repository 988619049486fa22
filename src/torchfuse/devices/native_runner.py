"""A runner of the user's own: ExecuTorch's executor_runner or PyTorch's speed_benchmark_torch.

torchfuse ships neither. Before anything is pushed, the binary itself is looked at: for which
processor it was built, which version of programs it reads, and whether it has the operators that
the models need.
"""

import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from torchfuse.devices.device_runner import Runner
from torchfuse.devices.executor_runner import ExecutorRunner
from torchfuse.devices.facts import DeviceFacts
from torchfuse.devices.operators import operators_of
from torchfuse.devices.speed_benchmark_runner import SpeedBenchmark
from torchfuse.errors import InputError, UnsupportedError
from torchfuse.measuring.tasks import Task
from torchfuse.targets import TARGETS, target_of

__all__ = ["native_runner"]

# e_machine of the ELF header → what `uname -m` says of a machine that runs it.
_MACHINES = {
    0x3E: ("x86_64",),
    0x03: ("i386", "i686", "x86_64"),
    0xB7: ("aarch64",),
    0x28: ("armv7l", "armv8l", "aarch64"),
    0xF3: ("riscv64",),
}
_NAMES = {0x3E: "x86-64", 0x03: "x86", 0xB7: "arm64", 0x28: "32-bit Arm", 0xF3: "RISC-V"}

# Text in the binary that tells an operator that was registered, and a program version.
_OPERATOR = re.compile(
    rb"(?:aten|quantized_decomposed|dim_order_ops)::[a-z_0-9]+(?:\.[A-Za-z_0-9]+)?"
)
_VERSION = re.compile(rb"\0(ET\d\d)\0")  # the identifier of the programs that it reads
_RUNNERS: Mapping[str, Callable[[Path], Runner]] = {
    "executor_runner": ExecutorRunner,
    "speed_benchmark_torch": SpeedBenchmark,
}
_FEWEST_OPERATORS = 5  # below, the kernels are in a library beside it, or the names are not kept


def native_runner(path: Path, tasks: Mapping[str, Task], facts: DeviceFacts) -> Runner:
    """Return the runner that the binary at `path` is, by the files that it is to run.

    Raises:
        InputError: no such file, no binary for the device, or models that want two runners.
        UnsupportedError: the binary lacks an operator that a model needs.
    """
    try:
        binary = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"Expected a runner, but '{path}' cannot be read: {error.strerror}."
        ) from error
    targets = {name: target_of(task.form) for name, task in tasks.items()}
    for name, target in targets.items():
        if target.native_runner is None:
            raise InputError(
                f"Expected models of {' or '.join(_suffixes(*_RUNNERS))} for --runner, got {name}; "
                f"leave --runner out, to measure it by the Python there."
            )
    kinds = {str(target.native_runner) for target in targets.values()}
    if len(kinds) > 1:
        raise InputError(
            "Expected models that one runner can run, got files of several; measure "
            + ", and ".join(f"{' and '.join(_suffixes(kind))} with {kind}" for kind in _RUNNERS)
            + "."
        )
    _require_architecture(path, binary, facts)
    _require_version(path, binary, tasks)
    _require_operators(path, binary, tasks)
    return _RUNNERS[kinds.pop()](path)


def _suffixes(*runners: str) -> list[str]:
    """Return the suffixes of the files that these runners run."""
    return [target.suffix for target in TARGETS if target.native_runner in runners]


def _require_architecture(path: Path, binary: bytes, facts: DeviceFacts) -> None:
    if binary[:2] == b"#!":
        return  # a script that starts the runner
    if binary[:4] != b"\x7fELF" or len(binary) < 20:
        raise InputError(
            f"Expected a program for the device (an ELF file), but '{path}' is none; give the "
            "executor_runner or speed_benchmark_torch that you built for it."
        )
    order = "<" if binary[5] == 1 else ">"
    (machine,) = struct.unpack_from(f"{order}H", binary, 18)
    fitting = _MACHINES.get(machine)
    if fitting is None or facts.architecture is None or facts.architecture in fitting:
        return
    raise InputError(
        f"'{path}' was built for {_NAMES[machine]}, and {facts.name} is {facts.architecture}; "
        "build it for that."
    )


def _require_version(path: Path, binary: bytes, tasks: Mapping[str, Task]) -> None:
    reads = set(_VERSION.findall(binary))
    for name, task in tasks.items():
        with task.path.open("rb") as file:
            version = file.read(8)[4:]
        is_program = target_of(task.form).native_runner == "executor_runner"
        if is_program and reads and version not in reads:
            raise UnsupportedError(
                f"{name} is a program of version {version.decode(errors='replace')}, and '{path}' "
                f"reads {b', '.join(sorted(reads)).decode()}; build the runner of the ExecuTorch "
                "that the file was made with."
            )


def _require_operators(path: Path, binary: bytes, tasks: Mapping[str, Task]) -> None:
    have = {name.decode() for name in _OPERATOR.findall(binary)}
    if len(have) < _FEWEST_OPERATORS:
        return  # it does not say
    for name, task in tasks.items():
        needed = {op for op in operators_of(task) if _OPERATOR.fullmatch(op.encode())}
        missing = sorted(needed - have)
        backends = task.metadata.get("backends", ())
        missing += [backend for backend in backends if backend.encode() not in binary]
        if missing:
            raise UnsupportedError(
                f"{name} needs {', '.join(missing)}, and '{path}' has not; build the runner with "
                "these kernels and backends (for .pte: portable and quantized kernels, XNNPACK)."
            )
