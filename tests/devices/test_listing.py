"""The listing where adb is missing, or a device goes while it is made."""

import io

import pytest
from rich.console import Console

from torchfuse.devices import listing
from torchfuse.devices.adb import AdbDevice
from torchfuse.devices.facts import DeviceFacts
from torchfuse.errors import DeviceError, InputError
from torchfuse.render.devices_text import blocks, described, show, table


def test_without_adb_this_machine_is_listed_and_the_problem_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> list[AdbDevice]:
        raise DeviceError("'adb' is not installed here; install it.")

    monkeypatch.setattr(listing, "adb_devices", missing)
    devices, problems = listing.listed()
    assert [(device.name, device.state) for device in devices] == [("local", "ready")]
    assert problems == ["'adb' is not installed here; install it."]


def test_a_device_that_has_just_gone_is_listed_as_unreachable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(serial: str) -> None:
        raise DeviceError(f"adb sees no device '{serial}' (it sees none).")

    monkeypatch.setattr(listing, "adb_devices", lambda: [AdbDevice("A1", "device", "Pixel")])
    monkeypatch.setattr(listing, "Adb", gone)
    devices, _ = listing.listed()
    assert (devices[1].name, devices[1].state) == ("adb:A1", "unreachable")
    assert devices[1].advice == "adb sees no device 'A1' (it sees none)"


def test_a_host_s_name_that_is_none_is_an_error() -> None:
    with pytest.raises(InputError, match="Expected a host as ssh takes it"):
        listing.listed(["-oProxyCommand=x"])


def test_a_model_in_brackets_is_shown_as_it_is() -> None:
    facts = DeviceFacts("ssh:[::1]", "ready", model="[/bold] [red]", cores=1)
    text = io.StringIO()
    Console(file=text, width=200).print(table([facts]))
    assert "ssh:[::1]" in text.getvalue()
    assert "[/bold] [red]" in text.getvalue()
    assert described(facts) == "[/bold] [red], 1 core"


PHONE = DeviceFacts(
    "adb:R58M",
    "ready",
    model="Google Pixel 8",
    soc="Google Tensor G3",
    architecture="aarch64",
    cores=9,
    memory_bytes=12_058_935_296,
    system="Android 14 (API 34)",
    governors=("powersave", "sched_pixel"),
    battery_percent=83,
    temperature_c=41.25,
)


def test_what_is_piped_has_a_line_a_device_however_wide(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show([PHONE, DeviceFacts("adb:2", "offline")])
    first, *devices = capsys.readouterr().out.splitlines()
    assert first.split()[:3] == ["device", "state", "model"]
    assert [line.split()[:2] for line in devices] == [["adb:R58M", "ready"], ["adb:2", "offline"]]
    assert "Google Pixel 8 Google Tensor G3, aarch64" in devices[0]


def test_a_narrow_terminal_is_shown_a_line_a_fact() -> None:
    assert blocks([PHONE, DeviceFacts("adb:2", "offline")]).splitlines() == [
        "adb:R58M",
        "  state:     ready",
        "  model:     Google Pixel 8",
        "  processor: Google Tensor G3, aarch64",
        "  cores:     9",
        "  memory:    12.06 GB",
        "  system:    Android 14 (API 34)",
        "  governor:  powersave, sched_pixel",
        "  battery:   83 %",
        "  heat:      41 °C",
        "adb:2",
        "  state:     offline",
    ]
