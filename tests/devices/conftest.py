"""Devices for tests: the real adb with devices that misbehave on request, and sshd."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from devices import adb_server
from devices import sshd as sshd_server
from devices.adb_server import AdbServer
from devices.fake_adbd import Device
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
def adb_device(adb_devices: Callable[..., Device]) -> Device:
    """A device that is connected and well."""
    return adb_devices()


@pytest.fixture
def sshd(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Sshd]:
    """An sshd of this test's own; the `ssh` and `scp` on the PATH know its hosts."""
    if missing := [path for path in sshd_server.NEEDED if not Path(path).exists()]:
        pytest.skip(
            f"{', '.join(missing)} not installed: apt-get install openssh-server openssh-client"
        )
    with sshd_server.running(tmp_path_factory.mktemp("sshd")) as server:
        monkeypatch.setenv("PATH", f"{server.bin}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        yield server
