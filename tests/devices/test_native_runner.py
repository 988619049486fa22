"""Which runner a binary is, and what is known of it before it is pushed."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torchfuse.cases import Case
from torchfuse.devices.executor_runner import ExecutorRunner
from torchfuse.devices.facts import DeviceFacts
from torchfuse.devices.native_runner import native_runner
from torchfuse.devices.speed_benchmark_runner import SpeedBenchmark
from torchfuse.errors import InputError, UnsupportedError
from torchfuse.measuring.tasks import Task, task_of

ARM = DeviceFacts("adb:1", "ready", architecture="aarch64")
NAMES = [f"aten::op{n}.out".encode() for n in range(9)]


@pytest.fixture
def task(model_files: Callable[[str], str], tmp_path: Path) -> Task:
    return task_of(model_files("third.pte"), Case((torch.ones(1, 3, 4, 4),)), tmp_path)


def elf(folder: Path, machine: int, text: bytes = b"", order: str = "little") -> Path:
    path = folder / "runner"
    kind = b"\x01" if order == "little" else b"\x02"
    number = machine.to_bytes(2, "little" if order == "little" else "big")
    path.write_bytes(b"\x7fELF\x02" + kind + bytes(12) + number + bytes(44) + text)
    return path


def test_a_runner_is_what_the_forms_of_the_files_say(task: Task, tmp_path: Path) -> None:
    runner = elf(tmp_path, 0xB7)
    script = dataclasses.replace(task, form="pt")
    assert isinstance(native_runner(runner, {"a": task}, ARM), ExecutorRunner)
    assert isinstance(native_runner(runner, {"a": script}, ARM), SpeedBenchmark)
    with pytest.raises(InputError, match=r"one runner can run, got files of several; .* \.pte"):
        native_runner(runner, {"a": task, "b": script}, ARM)


@pytest.mark.parametrize(
    ("machine", "order", "architecture", "fits"),
    [
        (0xB7, "little", "aarch64", True),
        (0xB7, "little", None, True),  # the device does not say
        (0x28, "little", "aarch64", True),  # 32-bit programs run on most
        (0xB7, "little", "armv7l", False),
        (0x3E, "little", "aarch64", False),
        (0xF3, "little", "x86_64", False),
        (0xB7, "big", "x86_64", False),
        (0x1234, "little", "x86_64", True),  # nobody knows
    ],
)
def test_a_binary_for_another_processor_is_an_error(
    task: Task, tmp_path: Path, machine: int, order: str, architecture: str | None, fits: bool
) -> None:
    runner = elf(tmp_path, machine, order=order)
    facts = dataclasses.replace(ARM, architecture=architecture)
    if fits:
        assert native_runner(runner, {"a": task}, facts)
        return
    with pytest.raises(InputError, match=rf"was built for .*, and adb:1 is {architecture}; build"):
        native_runner(runner, {"a": task}, facts)


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"MZ" + bytes(100), b"just text" * 9])
def test_what_is_no_program_is_an_error(task: Task, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "runner").write_bytes(data)
    with pytest.raises(InputError, match=r"Expected a program for the device \(an ELF file\)"):
        native_runner(tmp_path / "runner", {"a": task}, ARM)


def test_a_file_that_is_not_there_is_an_error(task: Task, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none' cannot be read: No such file or directory\."):
        native_runner(tmp_path / "none", {"a": task}, ARM)


def test_a_missing_operator_and_a_missing_backend_are_named(task: Task, tmp_path: Path) -> None:
    needs = {"operators": ["aten::op1.out", "aten::mul.out"], "backends": ["XnnpackBackend"]}
    wanting = dataclasses.replace(task, metadata=needs)
    runner = elf(tmp_path, 0xB7, b"\0".join(NAMES))
    with pytest.raises(UnsupportedError, match=r"^a needs aten::mul\.out, XnnpackBackend, and "):
        native_runner(runner, {"a": wanting}, ARM)
    runner = elf(tmp_path, 0xB7, b"\0".join([*NAMES, b"aten::mul.out", b"XnnpackBackend"]))
    assert native_runner(runner, {"a": wanting}, ARM)
    # One whose kernels are in a library beside it names hardly any: it is not judged.
    assert native_runner(elf(tmp_path, 0xB7, b"\0".join(NAMES[:2])), {"a": wanting}, ARM)


def test_a_script_that_starts_a_runner_is_taken(task: Task, tmp_path: Path) -> None:
    (tmp_path / "runner").write_text('#!/system/bin/sh\nexec ./real "$@"\n')
    assert native_runner(tmp_path / "runner", {"a": task}, ARM)
