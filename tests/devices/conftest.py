"""Devices for tests: the real adb with devices that misbehave on request, and sshd."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from devices import adb_server
from devices import sshd as sshd_server
from devices.adb_server import AdbServer
from devices.fake_adbd import Device
from devices.light_python import light_python as make_light_python
from devices.parts import executor_runner as runners
from devices.parts import phone as phones
from devices.parts import speed_benchmark
from devices.parts.phone import Phone
from devices.processes import kill
from devices.sshd import Sshd


@pytest.fixture
def adb(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[AdbServer]:
    """An adb server of this test's own, which `adb` without further settings uses as well."""
    if shutil.which("adb") is None:
        pytest.skip("adb is not installed: apt-get install adb")
    with adb_server.running(tmp_path_factory.mktemp("adb")) as server:
        for name in (*adb_server.MISLEADING, "ADB_VENDOR_KEYS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in adb_server.settings(server.port).items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def adb_devices(
    adb: AdbServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Device]]:
    """A function that makes one more device and connects it; its arguments are Device's.

    With connect=False it listens only.
    """
    with contextlib.ExitStack() as stack:

        def made(*, connect: bool = True, **settings: Any) -> Device:
            device = Device(tmp_path_factory.mktemp("device"), **settings)
            device.start()
            stack.callback(device.stop)
            if connect:
                adb.adb("connect", device.serial)
                adb.wait_for(device.serial, "device")
            return device

        yield made


@pytest.fixture
def lost_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for a device to come back and be cleaned up."""
    monkeypatch.setattr("torchfuse.devices.transport._WAITS_TO_CLEAN_S", (0.1,))


@pytest.fixture
def adb_device(adb_devices: Callable[..., Device]) -> Device:
    """A device that is connected and well."""
    return adb_devices()


def _sshd(
    folder: Path, monkeypatch: pytest.MonkeyPatch, inside: Sequence[str] = ()
) -> Iterator[Sshd]:
    if missing := [path for path in sshd_server.NEEDED if not Path(path).exists()]:
        pytest.skip(
            f"{', '.join(missing)} not installed: apt-get install openssh-server openssh-client"
        )
    with sshd_server.running(folder, inside) as server:
        monkeypatch.setenv("PATH", f"{server.bin}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        yield server


@pytest.fixture
def sshd(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Sshd]:
    """An sshd of this test's own; the `ssh` and `scp` on the PATH know its hosts."""
    yield from _sshd(tmp_path_factory.mktemp("sshd"), monkeypatch)


@pytest.fixture(scope="session")
def light_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python without torch that runs `third.pte`, for --device-python."""
    return make_light_python(tmp_path_factory.mktemp("python"))


@pytest.fixture(scope="session")
def emulated_phone() -> Iterator[Phone]:
    """An arm64 phone that is on, for all tests; take `phone` or `arm64_board` instead."""
    if obstacle := phones.obstacle():
        pytest.skip(obstacle)
    torch = speed_benchmark.for_phone() if shutil.which(speed_benchmark.COMPILER) else None
    with phones.running(torch=torch) as running:
        yield running


@pytest.fixture
def phone(adb: AdbServer, emulated_phone: Phone) -> Iterator[Phone]:
    """An arm64 phone, emulated, with AOSP's adbd; adb is connected to it."""
    if emulated_phone.adbd is None:
        emulated_phone.start_adbd()
    adb.adb("connect", emulated_phone.serial)
    adb.wait_for(emulated_phone.serial, "device")
    yield emulated_phone
    kill([*emulated_phone.processes()])
    for left in emulated_phone.tmp.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@pytest.fixture
def arm64_board(
    emulated_phone: Phone,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Sshd]:
    """An arm64 machine, emulated, over ssh: the same as the phone, with its files in /tmp."""
    inside = emulated_phone.command("TMPDIR=/tmp", "/bin/sh", "-c")
    yield from _sshd(tmp_path_factory.mktemp("board"), monkeypatch, inside)


@pytest.fixture(scope="session")
def executor_runner() -> Path:
    """A runner for .pte files with the options and messages of ExecuTorch's, for this machine."""
    if not shutil.which("g++"):
        pytest.skip("g++ not installed")
    return runners.for_this_machine()


@pytest.fixture(scope="session")
def arm64_speed_benchmark(emulated_phone: Phone) -> Path:
    """PyTorch's own speed_benchmark_torch for the phone, to push there."""
    if not shutil.which(speed_benchmark.COMPILER):
        pytest.skip(f"{speed_benchmark.COMPILER} not installed")
    return speed_benchmark.for_phone() / "bin/speed_benchmark_torch"


@pytest.fixture(scope="session")
def arm64_executor_runner(emulated_phone: Phone) -> Path:
    """A runner for .pte files with the options and messages of ExecuTorch's, for the phone."""
    if not shutil.which(runners.COMPILER):
        pytest.skip(f"{runners.COMPILER} not installed")
    return runners.for_phone()
