"""`torchfuse devices` without any device; those with are in tests/devices."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from torchfuse.cli import main

Devices = Callable[..., tuple[int, str, str]]


@pytest.fixture
def devices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Devices:
    """Run `torchfuse devices …` where there is an `ssh` that finds no host, and no adb."""
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\necho ssh: Could not resolve hostname there >&2\nexit 255\n")
    ssh.chmod(0o755)
    for name in ("sh", "uname", "nproc", "sed", "head", "tr", "cat", "grep"):
        found = next(p for p in (Path("/bin") / name, Path("/usr/bin") / name) if p.exists())
        (tmp_path / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(tmp_path))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["torchfuse", "devices", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run


def test_this_machine_is_listed_and_that_adb_is_missing_is_a_note(
    devices: Devices, tmp_path: Path
) -> None:
    saved = tmp_path / "devices.json"
    status, printed, errors = devices(f"--json={saved}")
    assert status == 0
    assert printed.splitlines()[1].startswith("local  ready ")
    assert errors.startswith("Note: 'adb' is not installed here; install it")
    (this,) = json.loads(saved.read_text())
    assert (this["name"], this["state"]) == ("local", "ready")


def test_json_on_stdout_takes_the_place_of_the_table(devices: Devices, tmp_path: Path) -> None:
    status, printed, _ = devices("--json=-")
    assert status == 0
    assert [device["name"] for device in json.loads(printed)] == ["local"]
    assert not Path("-").exists()


def test_its_help_shows_the_examples_a_line_each(devices: Devices) -> None:
    _, printed, _ = devices("--help")
    assert "\\b" not in printed
    assert "  torchfuse devices\n" in printed


@pytest.mark.parametrize("host", ["pi@there", "ssh:pi@there"])
def test_a_host_that_cannot_be_reached_is_said_to_be_so_and_ends_with_status_2(
    devices: Devices, host: str
) -> None:
    status, printed, errors = devices(host)
    assert status == 2
    assert printed.splitlines()[2].startswith("ssh:pi@there unreachable")
    assert "ssh:pi@there: there is no host of that name; correct it" in errors
    assert errors.splitlines()[-1] == ("torchfuse: error: ssh:pi@there cannot be used as it is.")


def test_a_file_that_cannot_be_written_is_known_before_anything_is_asked(
    devices: Devices, tmp_path: Path
) -> None:
    status, printed, errors = devices(f"--json={tmp_path}/none/out.json")
    assert (status, printed) == (2, "")
    assert "does not exist; create it first" in errors
