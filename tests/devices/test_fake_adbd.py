"""The stand-in for a device behaves, and fails, as the real adb knows it from devices."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from devices.adb_server import AdbServer
from devices.fake_adbd import Device

STRANGE = "-a 'b\" ;c$(d)\n.bin"


def test_a_command_gives_its_status_and_both_outputs_apart(
    adb: AdbServer, adb_device: Device
) -> None:
    ran = adb.adb("shell", "echo out; echo err >&2; exit 7")
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, b"out\n", b"err\n")


@pytest.mark.parametrize(
    ("command", "status"), [("kill -SEGV $$", 139), ("/data/local/tmp/none", 127)]
)
def test_signals_and_missing_programs_have_the_status_they_have_on_devices(
    adb: AdbServer, adb_device: Device, command: str, status: int
) -> None:
    assert adb.adb("shell", command).returncode == status


def test_what_a_command_reads_comes_through(adb: AdbServer, adb_device: Device) -> None:
    adb_device.install("seen", '#!/bin/sh\nIFS= read -r line; echo "[$line]"\n')
    ran = adb.adb("shell", "seen", input=b"one line\n")
    assert ran.stdout == b"[one line]\n"


def test_a_device_without_shell_v2_has_one_output_and_no_status(
    adb: AdbServer, adb_devices: Callable[..., Device]
) -> None:
    adb_devices(features="")
    ran = adb.adb("shell", "echo out; echo err >&2; exit 7")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"out\r\nerr\r\n", b"")


def test_paths_are_the_devices_in_commands_and_in_what_they_print(
    adb: AdbServer, adb_device: Device
) -> None:
    made = adb.adb("shell", "mktemp -d '/data/local/tmp/it is.XXXX'").stdout.decode().strip()
    assert made.startswith("/data/local/tmp/it is.")
    assert (adb_device.tmp / Path(made).name).is_dir()
    many = adb.adb("shell", "for n in $(seq 3000); do echo /data/local/tmp/$n; done").stdout
    assert many.decode().split() == [f"/data/local/tmp/{n}" for n in range(1, 3001)]


def test_it_says_what_it_is(adb: AdbServer, adb_devices: Callable[..., Device]) -> None:
    adb_devices(properties={"ro.product.model": "Other 9"})
    assert adb.adb("shell", "getprop ro.product.model").stdout == b"Other 9\n"
    assert b"[ro.soc.model]: [FK8000]\n" in adb.adb("shell", "getprop").stdout
    assert b"level: 87\n" in adb.adb("shell", "dumpsys battery").stdout
    governors = adb.adb("shell", "cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor")
    assert governors.stdout.split() == [b"schedutil"] * 4
    assert b"model:Other_9" in adb.adb("devices", "-l").stdout


def test_files_and_folders_go_there_and_back(
    adb: AdbServer, adb_device: Device, tmp_path: Path
) -> None:
    folder = tmp_path / "it"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / STRANGE).write_bytes(bytes(range(256)) * 4000)
    assert adb.adb("push", str(folder), "/data/local/tmp/").returncode == 0
    assert [path.name for path in (adb_device.tmp / "it/sub").iterdir()] == [STRANGE]
    assert adb.adb("pull", "/data/local/tmp/it", str(tmp_path / "back")).returncode == 0
    back = tmp_path / "back/sub" / STRANGE
    assert back.read_bytes() == (folder / "sub" / STRANGE).read_bytes()


def test_two_devices_and_none_named_is_an_error_of_adbs(
    adb: AdbServer, adb_devices: Callable[..., Device]
) -> None:
    first, second = adb_devices(), adb_devices(serial="FAKE0002")
    assert b"more than one device" in adb.adb("shell", "true").stderr
    for device in (first, second):
        assert adb.adb("shell", "exit 5", serial=device.serial).returncode == 5


def test_unauthorized_until_it_is_allowed(adb: AdbServer, adb_device: Device) -> None:
    adb_device.revoke()
    adb.wait_for(adb_device.serial, "unauthorized")
    assert b"unauthorized" in adb.adb("shell", "true").stderr
    adb_device.allow()
    adb.wait_for(adb_device.serial, "device")


def test_offline_until_it_comes_back(adb: AdbServer, adb_device: Device) -> None:
    adb_device.go_offline()
    adb.wait_for(adb_device.serial, "offline")
    assert b"device offline" in adb.adb("shell", "true").stderr
    adb_device.come_back()
    adb.wait_for(adb_device.serial, "device")


def test_lost_amid_a_push(adb: AdbServer, adb_device: Device, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(5_000_000))
    adb_device.faults.drop_push_after = 1_000_000
    assert adb.adb("push", str(tmp_path / "big"), "/data/local/tmp/big").returncode == 1
    assert 1_000_000 <= (adb_device.tmp / "big").stat().st_size < 5_000_000
    assert adb.state(adb_device.serial) in ("offline", None)
    adb_device.come_back()
    adb.wait_for(adb_device.serial, "device")
    assert adb.adb("push", str(tmp_path / "big"), "/data/local/tmp/big").returncode == 0


def test_lost_amid_a_pull(adb: AdbServer, adb_device: Device, tmp_path: Path) -> None:
    (adb_device.tmp / "big").write_bytes(bytes(5_000_000))
    adb_device.faults.drop_pull_after = 1_000_000
    assert adb.adb("pull", "/data/local/tmp/big", str(tmp_path)).returncode == 1


def test_lost_amid_a_run_adb_says_all_is_well(adb: AdbServer, adb_device: Device) -> None:
    """As measured with a real adbd: status 0 and half of the output."""
    adb_device.faults.drop_shell_after = 30
    ran = adb.adb("shell", "seq 1 100; exit 7")
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert ran.stdout.split() == [b"%d" % n for n in range(1, 14)]


def test_a_drop_may_be_one_from_which_it_returns(adb: AdbServer, adb_device: Device) -> None:
    adb_device.faults.returns = True
    adb_device.faults.drop_shell_after = 1
    adb.adb("shell", "echo gone")
    adb.wait_for(adb_device.serial, "device")
    assert adb.adb("shell", "echo back").stdout == b"back\n"
    assert adb_device.drops == 1


def test_what_a_lost_shell_started_runs_on_until_someone_ends_it(
    adb: AdbServer, adb_device: Device
) -> None:
    adb_device.faults.drop_shell_after = 1
    adb.adb("shell", "sleep 1000 & echo started; wait")
    assert adb_device.processes()


def test_no_space(adb: AdbServer, adb_device: Device, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(500_000))
    adb_device.faults.space = 1000
    ran = adb.adb("push", str(tmp_path / "big"), "/data/local/tmp/big")
    assert ran.returncode == 1
    assert b"No space left on device" in ran.stdout + ran.stderr
    assert (adb_device.tmp / "big").stat().st_size == 1000


def test_a_folder_that_cannot_be_written_to(
    adb: AdbServer, adb_device: Device, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    adb_device.faults.read_only = True
    assert adb.adb("push", str(tmp_path / "file"), "/data/local/tmp/file").returncode == 1
    assert adb.adb("shell", "mkdir /data/local/tmp/folder").returncode == 1
    assert adb.adb("shell", "echo > /data/local/tmp/file").returncode != 0
    assert not list(adb_device.tmp.iterdir())


def test_a_copy_may_arrive_changed(adb: AdbServer, adb_device: Device, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    adb_device.faults.corrupt_push = True
    assert adb.adb("push", str(tmp_path / "file"), "/data/local/tmp/file").returncode == 0
    assert (adb_device.tmp / "file").read_bytes() == b"abb"
    adb_device.faults.corrupt_pull = True
    assert adb.adb("pull", "/data/local/tmp/file", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back").read_bytes() == b"abc"


def test_a_slow_device_answers_all_the_same(adb: AdbServer, adb_device: Device) -> None:
    adb_device.faults.delay_s = 0.05
    start = time.monotonic()
    assert adb.adb("shell", "echo there").stdout == b"there\n"
    assert time.monotonic() - start >= 0.1


def test_nothing_is_left_when_it_stops(adb: AdbServer, adb_devices: Callable[..., Device]) -> None:
    device = adb_devices()
    adb.adb("shell", "sleep 1000 > /dev/null 2>&1 < /dev/null & exit 3")
    assert len(device.processes()) == 1
    device.stop()
    assert not device.processes()
