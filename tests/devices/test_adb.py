"""The adb transport: the real adb, and a device whose faults are switched on."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from devices.adb_server import AdbServer
from devices.fake_adbd import Device
from torchfuse.devices.adb import Adb, adb_devices
from torchfuse.devices.facts import facts_of
from torchfuse.devices.listing import listed
from torchfuse.errors import DeviceError

STRANGE = "-a 'b\" ;c$(touch d)\n.bin"


def test_push_run_pull_and_nothing_is_left(adb_device: Device, tmp_path: Path) -> None:
    (tmp_path / STRANGE).write_bytes(bytes(range(256)) * 1000)
    with Adb() as phone:
        assert phone.folder.startswith("/data/local/tmp/torchfuse-")
        phone.push(tmp_path / STRANGE, "0.bin")
        ran = phone.run(
            ["sh", "-c", "cp 0.bin 1.bin; echo it is; echo err >&2; exit 3"], timeout_s=20
        )
        phone.pull("1.bin", tmp_path / "back")
    assert (ran.status, ran.stdout, ran.stderr) == (3, "it is\n", "err\n")
    assert (tmp_path / "back").read_bytes() == (tmp_path / STRANGE).read_bytes()
    assert list(adb_device.tmp.iterdir()) == []
    assert adb_device.processes() == []
    assert not any("touch d" in command for command in adb_device.commands)


def test_a_device_from_before_exit_statuses_still_gives_them(
    adb_devices: Callable[..., Device],
) -> None:
    adb_devices(features="")
    with Adb() as phone:
        ran = phone.run(["sh", "-c", "echo out; exit 7"], timeout_s=20)
    assert (ran.status, ran.stdout) == (7, "out\n")


def test_it_says_what_it_is(adb_device: Device) -> None:
    facts = facts_of(Adb())
    assert facts.name == f"adb:{adb_device.serial}"
    assert facts.model == "Fake Fake Phone 8"
    assert facts.soc == "Fake FK8000"
    assert facts.system == "Android 14 (API 34)"
    assert facts.cores == 4
    assert facts.memory_bytes == 7812345 * 1024
    assert facts.governors == ("schedutil",)
    assert facts.battery_percent == 87
    assert facts.temperature_c == 41.3


def test_an_emulator_says_that_it_is_one(adb_devices: Callable[..., Device]) -> None:
    adb_devices(properties={"ro.kernel.qemu": "1"})
    assert facts_of(Adb()).emulated is True


def test_the_listing_has_this_machine_and_every_device_with_what_to_do(
    adb: AdbServer, adb_devices: Callable[..., Device]
) -> None:
    well, shy = adb_devices(), adb_devices(connect=False)
    shy.faults.unauthorized = True
    adb.adb("connect", shy.serial)
    adb.wait_for(shy.serial, "unauthorized")
    devices, problems = listed()
    by_name = {device.name: device for device in devices}
    assert (problems, devices[0].name) == ([], "local")
    assert by_name[f"adb:{well.serial}"].state == "ready"
    assert by_name[f"adb:{shy.serial}"].state == "unauthorized"
    assert by_name[f"adb:{shy.serial}"].advice == (
        "unlock the device and allow this computer in the dialog that it shows"
    )


def test_no_device_is_an_error(adb: AdbServer) -> None:
    assert adb_devices_listed() == []
    with pytest.raises(DeviceError, match=r"^adb sees no device; connect one and allow USB"):
        Adb()


def adb_devices_listed() -> list[str]:
    return [device.serial for device in adb_devices()]


def test_two_devices_and_none_named_is_an_error_that_names_them(
    adb_devices: Callable[..., Device],
) -> None:
    first, second = adb_devices(), adb_devices()
    with pytest.raises(DeviceError, match=r"adb sees 2 devices .* and none was named; name one: "):
        Adb()
    assert {Adb(first.serial).serial, Adb(second.serial).serial} == {first.serial, second.serial}


def test_a_device_of_another_name_is_an_error(adb_device: Device) -> None:
    with pytest.raises(DeviceError, match=rf"no device 'NONE' \(it sees {adb_device.serial}\)"):
        Adb("NONE")


def test_an_unauthorized_device_is_an_error_until_it_is_allowed(
    adb: AdbServer, adb_devices: Callable[..., Device]
) -> None:
    phone = adb_devices(connect=False)
    phone.faults.unauthorized = True
    adb.adb("connect", phone.serial)
    adb.wait_for(phone.serial, "unauthorized")
    with pytest.raises(DeviceError, match=r"is unauthorized; unlock the device and allow this"):
        Adb(phone.serial)
    phone.allow()
    adb.wait_for(phone.serial, "device")
    assert Adb(phone.serial).shell("echo well").stdout == "well\n"


def test_an_offline_device_is_an_error(adb: AdbServer, adb_device: Device) -> None:
    adb_device.go_offline()
    adb.wait_for(adb_device.serial, "offline")
    with pytest.raises(DeviceError, match=r"is offline; take the cable out and put it in again"):
        Adb()


@pytest.mark.usefixtures("lost_for_good")
def test_a_device_lost_amid_a_push_is_an_error(adb_device: Device, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(3_000_000))
    adb_device.faults.drop_push_after = 1_000_000
    with pytest.raises(DeviceError) as caught, Adb() as phone:
        phone.push(large, "large")
    assert str(caught.value).startswith(f"adb:{adb_device.serial}: ")
    assert adb_device.drops == 1


@pytest.mark.usefixtures("lost_for_good")
def test_a_device_lost_amid_a_run_is_an_error_although_adb_ends_with_0(
    adb_device: Device,
) -> None:
    with pytest.raises(DeviceError, match="the device was lost, or its shell ended, before"):
        with Adb() as phone:
            adb_device.faults.drop_shell_after = 2000
            phone.run(["sh", "-c", "for n in $(seq 1000); do echo $n; done"], timeout_s=30)


def test_a_device_that_comes_back_is_cleaned_up(adb: AdbServer, adb_device: Device) -> None:
    adb_device.faults.returns = True
    with pytest.raises(DeviceError, match="the device was lost"), Adb() as phone:
        adb_device.faults.drop_shell_after = 10
        phone.run(["sh", "-c", "echo half of what there is; sleep 1000"], timeout_s=1000)
    assert list(adb_device.tmp.iterdir()) == []
    assert adb_device.processes() == []


def test_no_space_is_an_error_that_says_how_much_is_needed(
    adb_device: Device, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(3_000_000))
    adb_device.faults.space = 1_000_000
    with pytest.raises(DeviceError, match=r"has no room for the 3,000,000 bytes of 'large'; free"):
        with Adb() as phone:
            phone.push(large, "large")
    assert list(adb_device.tmp.iterdir()) == []


def test_a_read_only_folder_is_an_error_that_names_the_option(adb_device: Device) -> None:
    adb_device.faults.read_only = True
    with pytest.raises(DeviceError, match=r"no folder can be made in .*--device-folder"):
        Adb().__enter__()


def test_a_file_that_arrives_with_another_bit_is_an_error(
    adb_device: Device, tmp_path: Path
) -> None:
    source = tmp_path / "file"
    source.write_bytes(bytes(1000))
    adb_device.faults.corrupt_push = True
    with pytest.raises(DeviceError, match="'file' arrived damaged: its SHA-256 there is"):
        with Adb() as phone:
            phone.push(source, "file")


def test_what_takes_too_long_is_ended_on_the_device(adb_device: Device) -> None:
    with Adb() as phone:
        with pytest.raises(DeviceError, match="was ended on the device after 1 s"):
            phone.run(["sleep", "1000"], timeout_s=1)
        assert adb_device.processes() == []


def test_stopping_leaves_nothing_running_or_lying_there(adb_device: Device) -> None:
    phone = Adb()
    threading.Timer(1.0, phone.stop).start()
    with pytest.raises(DeviceError, match=r": stopped\.$"), phone:
        phone.run(["sleep", "1000"], timeout_s=1000)
    assert list(adb_device.tmp.iterdir()) == []
    assert adb_device.processes() == []


def test_without_adb_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DeviceError, match=r"'adb' is not installed here; install it"):
        Adb()
