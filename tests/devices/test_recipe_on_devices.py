"""The files of PyTorch's recipe, measured by speed_benchmark_torch over adb and over ssh."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from devices.fake_adbd import Device
from devices.sshd import Sshd
from devices.test_bench_devices import SPEED_BENCHMARK, WITH_TORCH
from test_recipe_example import SCRIPT, VERBATIM, run
from torchfuse.cases import Case
from torchfuse.devices.adb import Adb
from torchfuse.devices.benching import Settings, bench_on
from torchfuse.devices.local import Local
from torchfuse.devices.run import DeviceRun
from torchfuse.devices.ssh import Ssh
from torchfuse.measuring.tasks import Task, task_of

CASE = Case((torch.ones(1, 3, 32, 32),))  # smaller, for the test to be fast
FULL = ["model.pt", "model_fused.pt"]
LITE = ["model.ptl", "model_fused.ptl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipe writes, as it was written: not calibrated, and not sealed."""
    return run(VERBATIM, tmp_path_factory.mktemp("recipe")).folder


def tasks(folder: Path, names: list[str]) -> dict[str, Task]:
    return {name: task_of(folder / name, CASE, folder) for name in names}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """With a speed_benchmark_torch to push: torchfuse's own."""
    runner = tmp_path / "speed_benchmark_torch"
    runner.write_text(SPEED_BENCHMARK.format(python=sys.executable, path=sys.path))
    return Settings(runs=2, warmup=1, runner=runner, timeout_s=120)


def assert_measured(run: DeviceRun, names: list[str]) -> None:
    assert run.error is None
    assert [(m.name, m.runs) for m in run.measurements] == [(name, 2) for name in names]
    assert all(difference.max_abs == 0 for _, difference in run.differences)


def test_over_adb(adb_device: Device, folder: Path, settings: Settings) -> None:
    assert_measured(bench_on(Adb(), tasks(folder, FULL), settings), FULL)
    assert list(adb_device.tmp.iterdir()) == []


def test_over_ssh(sshd: Sshd, folder: Path, settings: Settings) -> None:
    assert_measured(bench_on(Ssh("board"), tasks(folder, LITE), settings), LITE)


def test_over_ssh_with_the_pytorch_that_is_there(sshd: Sshd, folder: Path) -> None:
    settings = dataclasses.replace(WITH_TORCH, runs=2, warmup=1)
    assert_measured(bench_on(Ssh("board"), tasks(folder, FULL), settings), FULL)


def test_a_file_without_a_seal_may_round_as_int8_does(tmp_path: Path) -> None:
    """Another processor's kernels may come out one quantization step beside ours."""
    different = {}
    for name, task in tasks(run(SCRIPT, tmp_path).folder, ["model.pt", "model.ptl"]).items():
        there = task.expected[0].clone()
        there[..., 0, 0] += float(there[there > 0].min())
        different[name] = dataclasses.replace(task, expected=(there,))
    measured = bench_on(Local(), different, dataclasses.replace(WITH_TORCH, runs=2, warmup=1))
    assert measured.error is None
    assert all(difference.max_rel > 1e-3 for _, difference in measured.differences)
