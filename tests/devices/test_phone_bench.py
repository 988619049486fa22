"""MobileNetV2 on the emulated phone and board, by every runner: the same outputs as here."""

import math
from pathlib import Path

import pytest
import torch

import torchfuse
from devices.adb_server import AdbServer
from devices.parts.phone import Phone
from devices.sshd import Sshd
from torchfuse.cases import Case
from torchfuse.devices.adb import Adb
from torchfuse.devices.benching import Settings, bench_on
from torchfuse.devices.run import DeviceRun
from torchfuse.devices.ssh import Ssh
from torchfuse.measuring.tasks import Task, task_of
from torchfuse.models.batch_norms import settle_batch_norms
from torchfuse.models.mobilenet_v2 import MobileNetV2

pytestmark = pytest.mark.devices

SHAPE = (1, 3, 224, 224)
SETTINGS = Settings(runs=3, warmup=1, timeout_s=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mobilenet")
    torch.manual_seed(0)
    images = torch.rand(4, *SHAPE[1:])
    model = settle_batch_norms(MobileNetV2(), images)
    torchfuse.export(model, images[:1], folder / "fp32.pte")
    torchfuse.export(model, images[:1], folder / "int8.pte", precision="int8", calibration=images)
    torchfuse.export(model, images[:1], folder / "fp32.ptl")
    return folder


def tasks(folder: Path, *names: str) -> dict[str, Task]:
    case = Case((torch.ones(SHAPE),))
    return {name: task_of(folder / name, case, folder) for name in names}


def assert_measured(run: DeviceRun, *names: str) -> None:
    assert run.error is None
    assert [(m.name, m.runs) for m in run.measurements] == [(name, 3) for name in names]
    assert run.device.architecture == "aarch64"
    assert run.device.emulated is True
    assert "emulated" in {caution.kind for caution in run.cautions}
    for name, difference in run.differences:
        assert difference.max_abs is not None
        assert difference.sqnr_db is not None
        if name == "int8.pte":  # integers: the same to the last bit
            assert (difference.max_abs, difference.sqnr_db) == (0.0, math.inf)
        else:
            assert difference.sqnr_db > 80


def test_by_torchfuses_runner_over_adb(adb: AdbServer, phone: Phone, folder: Path) -> None:
    run = bench_on(Adb(phone.serial), tasks(folder, "int8.pte"), SETTINGS)
    assert_measured(run, "int8.pte")
    assert run.runner is not None
    assert run.runner.startswith("executorch-numpy-runtime")
    assert list(phone.tmp.iterdir()) == []


def test_by_torchfuses_runner_over_ssh(arm64_board: Sshd, folder: Path) -> None:
    run = bench_on(Ssh("board"), tasks(folder, "int8.pte"), SETTINGS)
    assert_measured(run, "int8.pte")


def test_by_an_executor_runner_of_ones_own(
    adb: AdbServer, phone: Phone, arm64_executor_runner: Path, folder: Path
) -> None:
    settings = Settings(runs=3, warmup=1, timeout_s=300, runner=arm64_executor_runner)
    run = bench_on(Adb(phone.serial), tasks(folder, "int8.pte", "fp32.pte"), settings)
    assert_measured(run, "int8.pte", "fp32.pte")
    assert list(phone.tmp.iterdir()) == []


def test_by_pytorchs_own_speed_benchmark_torch(
    adb: AdbServer, phone: Phone, arm64_speed_benchmark: Path, folder: Path
) -> None:
    settings = Settings(runs=3, warmup=1, timeout_s=300, runner=arm64_speed_benchmark)
    run = bench_on(Adb(phone.serial), tasks(folder, "fp32.ptl"), settings)
    assert_measured(run, "fp32.ptl")


def test_a_runner_for_this_machine_is_refused(adb: AdbServer, phone: Phone, folder: Path) -> None:
    settings = Settings(runs=3, runner=Path("/bin/true"))
    run = bench_on(Adb(phone.serial), tasks(folder, "int8.pte"), settings)
    assert run.error is not None
    assert "was built for x86-64, and" in run.error
