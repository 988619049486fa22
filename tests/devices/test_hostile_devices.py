"""Devices that lie, babble, or break what they were told."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from devices.adb_server import AdbServer
from devices.fake_adbd import Device
from devices.light_python import light_python as make_light_python
from devices.pausing import pausing_python, python_that
from devices.sshd import Sshd
from torchfuse.cases import Case
from torchfuse.devices import transport as transport_module
from torchfuse.devices.adb import Adb
from torchfuse.devices.benching import Settings, bench_on
from torchfuse.devices.local import Local
from torchfuse.devices.run import DeviceRun
from torchfuse.devices.ssh import Ssh
from torchfuse.devices.transport import last_line
from torchfuse.errors import ArtifactError, DeviceError
from torchfuse.measuring.tasks import Task, task_of

Files = Callable[[str], str]
SETTINGS = Settings(runs=4, warmup=1, timeout_s=60)


@pytest.fixture
def tasks(model_files: Files, tmp_path: Path) -> dict[str, Task]:
    folder = tmp_path / "inputs"
    folder.mkdir()
    case = Case((torch.arange(48.0).reshape(1, 3, 4, 4),))
    return {"third.pte": task_of(model_files("third.pte"), case, folder)}


def on(python: Path, tasks: dict[str, Task], folder: Path) -> DeviceRun:
    """What a board with this Python is measured to be; nothing is left there, whatever it says."""
    base = folder / "it's a board"
    base.mkdir()
    run = bench_on(Local(str(base)), tasks, dataclasses.replace(SETTINGS, python=str(python)))
    assert list(base.iterdir()) == []
    return run


SEND = """\
    if told["kind"] == "{kind}":
        {change}
        line = event(**told)
    whole(line)
"""


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "loaded",
            "told['outputs'][0]['file'] = '{victim}'",
            "expected what torchfuse's runner tells, got an output file of another name than its",
        ),
        ("loaded", "told['outputs'][0]['dtype'] = 'load'", "is said to be [1, 3, 4, 4] of load"),
        ("loaded", "told['outputs'][0]['dtype'] = 'float64'", "of float64, which it cannot be"),
        ("loaded", "told['outputs'][0]['shape'] = [10**9, 10**9]", "of float32, which it cannot"),
        ("loaded", "told['outputs'][0]['shape'] = [48]", "computes something else there"),
        ("loaded", "told['outputs'][0]['sha256'] = 'x'", "an output arrived damaged"),
        ("loaded", "told['outputs'] = []", "returned 0 tensors there, and 1 here"),
        ("loaded", "told['artifact'] = 9", "of a model that it was not given"),
        ("runtime", "told['form'] = 'pt'", None),  # does not say what it has for .pte
        ("warm", "told['warmup_runs'] = -1", "got an event 'warm' without a valid 'warmup_runs'"),
        ("round", "told['samples_s']['0'] = [float('nan')]", "without a valid 'samples_s'"),
        ("end", "told = dict(kind='failed', artifact=0, reason='\\x1b[2J')", "\ufffd[2J"),
    ],
)
def test_a_device_that_lies_is_an_error_and_nothing_here_is_touched(
    light_python: Path,
    tasks: dict[str, Task],
    tmp_path: Path,
    kind: str,
    change: str,
    message: str | None,
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    body = SEND.format(kind=kind, change=change.format(victim=victim))
    run = on(python_that(tmp_path, light_python, body), tasks, tmp_path)
    assert victim.read_text() == "mine"
    if message is None:
        assert run.error is None
        return
    assert run.error is not None
    assert run.error.startswith("local: ")
    assert message in run.error
    assert run.error.isprintable()


def test_what_python_prints_between_the_events_is_not_minded(
    light_python: Path, tasks: dict[str, Task], tmp_path: Path
) -> None:
    body = r"""
    whole("WARNING: {} #00000000")
    sys.stdout.write("\x1b[2J\x00\r\n[1] #83dcefb7\n" + "x" * 100_000 + "\n")
    whole(line)
"""
    run = on(python_that(tmp_path, light_python, body), tasks, tmp_path)
    assert (run.error, [m.runs for m in run.measurements]) == (None, [4])


def test_an_output_without_end_is_ended(
    light_python: Path, tasks: dict[str, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport_module, "_MOST_CHARACTERS", 1_000_000)
    body = """
    while True:
        sys.stdout.write("x" * 100_000)
"""
    run = on(python_that(tmp_path, light_python, body), tasks, tmp_path)
    assert run.error == (
        "local: the device printed more than 1,000,000 characters, which no runner does; see what "
        "it runs."
    )


def test_an_operator_that_the_runtime_there_lacks_is_named_before_anything_is_timed(
    tasks: dict[str, Task], tmp_path: Path
) -> None:
    python = make_light_python(tmp_path, operators=["aten::add.out"])
    needing = dataclasses.replace(tasks["third.pte"], metadata={"operators": ["aten::mul.out"]})
    run = on(python, {"third.pte": needing}, tmp_path)
    assert run.error is not None
    assert "third.pte needs aten::mul.out, for which the runtime on the device has no" in run.error
    assert run.measurements == ()


def test_what_goes_wrong_here_while_rounds_come_ends_the_run_there(
    light_python: Path, tasks: dict[str, Task], tmp_path: Path
) -> None:
    # A full disk, say, when the report is saved.
    def full(run: DeviceRun) -> None:
        raise ArtifactError("Cannot write 'out.json': the disk is full; free some.")

    base = tmp_path / "board"
    base.mkdir()
    pausing, _ = pausing_python(tmp_path, light_python, '"done": 2,')
    settings = dataclasses.replace(SETTINGS, python=str(pausing))
    run = bench_on(Local(str(base)), tasks, settings, on_partial=full)
    assert run.error == "Cannot write 'out.json': the disk is full; free some."
    assert list(base.iterdir()) == []


def test_no_room_for_temporary_files_here_is_an_error_that_names_tmpdir(
    light_python: Path, tasks: dict[str, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torchfuse.devices.python_runner.Path.write_text", full)
    run = on(light_python, tasks, tmp_path)
    assert run.error == (
        "local: a temporary file cannot be written here (No space left on device); set TMPDIR to a "
        "folder with room."
    )


def test_an_earlier_run_stays_when_the_device_is_lost_before_it_goes_on(
    light_python: Path, tasks: dict[str, Task], tmp_path: Path
) -> None:
    whole = on(light_python, tasks, tmp_path)
    earlier = {
        m.name: dataclasses.replace(m, samples_s=m.samples_s[:2]) for m in whole.measurements
    }
    body = """
    if told["kind"] == "warm":
        sys.exit("ended")
    whole(line)
"""
    python = python_that(tmp_path, light_python, body)
    settings = dataclasses.replace(SETTINGS, python=str(python))
    run = bench_on(Local(str(tmp_path)), tasks, settings, earlier=earlier)
    assert run.error == "local: the runner ended with status 1: ended."
    assert run.measurements == tuple(earlier.values())


def test_a_shell_that_greets_is_not_taken_for_the_command(
    adb_device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = Adb._shell_words

    def greeting(self: Adb, script: str) -> list[str]:
        return words(self, f"echo Welcome; printf half; {script}")

    monkeypatch.setattr(Adb, "_shell_words", greeting)
    with Adb() as phone:
        assert phone.folder.startswith("/data/local/tmp/torchfuse-")
        assert phone.run(["echo", "out"], timeout_s=20).stdout == "out\n"
    assert list(adb_device.tmp.iterdir()) == []


@pytest.mark.parametrize("left_out", [1, 17, 18, 19, 20])
def test_a_connection_lost_amid_the_line_of_the_end_is_no_end(
    monkeypatch: pytest.MonkeyPatch, left_out: int
) -> None:
    # Of a status 139, 1 and 13 would be one, too.
    def cut(_self: Local, script: str) -> list[str]:
        program = f"import sys; sys.stdout.write(sys.stdin.read().rstrip()[:-{left_out}])"
        return ["sh", "-c", 'sh -c "$0" | "$1" -c "$2"', script, sys.executable, program]

    monkeypatch.setattr(Local, "_shell_words", cut)
    with pytest.raises(DeviceError, match="the device was lost, or its shell ended, before"):
        Local().shell("(exit 139)")


def test_a_greeting_that_scp_stumbles_over_is_explained() -> None:
    text = "Received message too long 1752460652\nEnsure the remote shell produces no output"
    explained = Ssh("board")._explained(text)
    assert explained is not None
    assert explained.startswith("its shell prints something whenever it starts")


@pytest.mark.parametrize("host", ["::1", "pi@fe80::1%eth0"])
def test_scp_is_given_an_ipv6_address_in_brackets(host: str) -> None:
    user, at, address = host.rpartition("@")
    there = f"{user}{at}[{address}]:/there"
    assert Ssh(host)._copy_words("/here", "/there", push=True)[-2:] == ["/here", there]
    assert Ssh(host)._copy_words("/there", "/here", push=False)[-2:] == [there, "/here"]


def test_ssh_works_where_no_socket_can_be_made(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("torchfuse.devices.ssh.tempfile.mkdtemp", read_only)
    with Ssh("board") as board:
        assert board.run(["echo", "x"], timeout_s=20).stdout == "x\n"
    assert list(sshd.tmp.iterdir()) == []


def test_a_folder_in_place_of_a_file_is_not_pulled_as_one(
    adb_device: Device, tmp_path: Path
) -> None:
    with Adb() as phone:
        phone.shell(f"mkdir {phone.folder}/0.bin; echo x >{phone.folder}/0.bin/evil")
        with pytest.raises(DeviceError, match=r"'0\.bin' is no file there"):
            phone.pull("0.bin", tmp_path / "0.bin")


def test_two_runs_at_once_on_one_device_do_not_touch_each_other(adb_device: Device) -> None:
    with Adb() as first, Adb() as second:
        assert first.folder != second.folder
        ended = first.run(["sh", "-c", "echo first >file; exit 4"], timeout_s=20)
        assert "file" not in second.run(["ls"], timeout_s=20).stdout.split()
        assert ended.status == 4
    assert list(adb_device.tmp.iterdir()) == []


def test_a_server_of_adb_that_is_restarted_amid_a_run_is_an_error_and_the_device_comes_clean(
    adb: AdbServer,
    adb_device: Device,
    light_python: Path,
    tasks: dict[str, Task],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport_module, "_WAITS_TO_CLEAN_S", [1.0] * 20)  # on a busy machine
    pausing, _ = pausing_python(tmp_path, light_python, '"done": 2,')
    restarts: list[subprocess.Popen[bytes]] = []

    def restart(step: str) -> None:
        if step == "round 2 of 4":
            # A new server finds devices at a cable by itself, and those in the network not.
            again = f"until adb connect {adb_device.serial} | grep connected; do sleep 0.1; done"
            script = f"adb kill-server; {again}"
            command = ["sh", "-c", script]
            restarts.append(subprocess.Popen(command, env=adb.env, stdout=subprocess.DEVNULL))

    settings = dataclasses.replace(SETTINGS, python=str(pausing))
    run = bench_on(Adb(), tasks, settings, on_step=restart)
    assert restarts[0].wait(timeout=30) == 0
    assert run.error is not None
    assert "lost" in run.error
    assert [m.runs for m in run.measurements] == [2]
    assert list(adb_device.tmp.iterdir()) == []
    assert adb_device.processes() == []


def test_of_many_lines_the_last_that_says_something_is_shown_and_obeyed_by_no_terminal() -> None:
    text = "first\n\x1b[2Jreally\x07 bad.\n \n* daemon started successfully *\n"
    assert last_line(text) == "\ufffd[2Jreally\ufffd bad"
    assert last_line("") == ""
    assert len(last_line("x" * 10_000)) < 400


def test_a_native_runner_is_made_a_program_in_a_folder_of_any_name(
    tasks: dict[str, Task], tmp_path: Path
) -> None:
    runner = tmp_path / "runner"
    runner.write_text("#!/bin/sh\necho told >&2; exit 3\n")
    base = tmp_path / "it's; a $(touch folder)"
    base.mkdir()
    run = bench_on(Local(str(base)), tasks, dataclasses.replace(SETTINGS, runner=runner))
    assert run.error == "local: the runner ended with status 3 on third.pte: told."
    assert list(base.iterdir()) == []
    assert not Path("folder").exists()


def test_the_report_of_a_device_that_has_escape_sequences_for_a_name_has_none(
    adb_devices: Callable[..., Device],
    model_files: Files,
    light_python: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from torchfuse.cli import main

    adb_devices(properties={"ro.product.model": "[red]\x1b]0;owned\x07[/x]"})
    words = ["bench", model_files("third.pte"), "--input_dims=1,3,4,4", "--iter=3", "--device=adb"]
    words += [f"--device-python={light_python}", "--json=out.json", "--markdown=out.md"]
    monkeypatch.chdir(tmp_path)
    for arguments in (words, ["devices"]):
        monkeypatch.setattr(sys, "argv", ["torchfuse", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        printed, errors = capsys.readouterr()
        assert "[red]\ufffd]0;owned\ufffd[/x]" in printed
        assert "\x1b]" not in printed + errors
    written = (tmp_path / "out.md").read_text() + (tmp_path / "out.json").read_text()
    assert "\x1b" not in written
    assert "\\u001b" not in written
    assert json.loads((tmp_path / "out.json").read_text())["runs"][0]["error"] is None
    assert os.listdir(tmp_path).count("out.json") == 1
