"""Devices by the names that --device takes."""

import pytest

from torchfuse.devices.local import Local
from torchfuse.devices.named import checked_device, device_named
from torchfuse.devices.ssh import Ssh
from torchfuse.errors import InputError


@pytest.mark.parametrize("name", ["local", "adb", "adb:", "adb:R58M", "ssh:pi@raspberrypi"])
def test_these_are_names_of_devices(name: str) -> None:
    assert checked_device(name) == name


@pytest.mark.parametrize(
    "name", ["", "phone", "local:", "local:x", "ssh", "ssh:", "ADB", "usb:1", " adb", "adb "]
)
def test_anything_else_is_an_error_that_says_what_is_one(name: str) -> None:
    with pytest.raises(InputError, match=r"named local, adb, adb:SERIAL or ssh:HOST, got "):
        checked_device(name)


def test_a_name_leads_to_its_device() -> None:
    assert isinstance(device_named("local"), Local)
    board = device_named("ssh:pi@raspberrypi", "/data/it's")
    assert isinstance(board, Ssh)
    assert (board.host, board.name) == ("pi@raspberrypi", "ssh:pi@raspberrypi")
    assert board.base == "'/data/it'\"'\"'s'"
    with pytest.raises(InputError, match="Expected a host as ssh takes it"):
        device_named("ssh:-oProxyCommand=x")
