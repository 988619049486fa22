"""Ctrl-C, and what a CI job sends: nothing runs or lies anywhere, and what was measured stays."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from devices.fake_adbd import Device
from devices.pausing import pausing_python
from devices.processes import marked
from devices.sshd import Sshd
from torchfuse.devices import several
from torchfuse.devices.benching import Settings
from torchfuse.devices.transport import Transport
from torchfuse.errors import DeviceError

Files = Callable[[str], str]
SAID = (
    "torchfuse: interrupted; the rounds until then are in '{}', and --resume goes on with them.\n"
)
MARK = f"INTERRUPTED_TEST={uuid.uuid4().hex}"


@pytest.fixture
def devices(kinds: str, request: pytest.FixtureRequest) -> dict[str, Device | Sshd]:
    """The devices, by their names for --device."""
    fixtures = {"adb": ("adb", "adb_device"), "ssh": ("ssh:board", "sshd")}
    found = [fixtures[kind] for kind in kinds.split("+")]
    return {name: request.getfixturevalue(fixture) for name, fixture in found}


def wait_until_none(processes: Callable[[], list[int]]) -> None:
    """Returns once there is none: those that were killed take a moment on a busy machine."""
    deadline = time.monotonic() + 5
    while left := processes():
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


STAGES = {
    "push": '"kind": "runtime"',  # if it comes to that before anyone looks
    "check": '"kind": "runtime"',
    "warm-up": '"kind": "warm"',
    "rounds": '"done": 5,',
}


@pytest.mark.parametrize(
    ("kinds", "stage", "number"),
    [  # each takes the seconds in which torch is imported; the others only in make test-devices
        ("adb+ssh", "rounds", signal.SIGINT),
        *(
            pytest.param(kind, stage, signal.SIGINT, marks=pytest.mark.devices)
            for kind, stage in [
                ("adb", "push"),
                ("ssh", "push"),
                ("adb", "check"),
                ("ssh", "check"),
                ("adb", "warm-up"),
                ("ssh", "warm-up"),
                ("adb+ssh", "check"),
            ]
        ),
    ],
)
def test_what_is_interrupted_leaves_nothing_but_what_was_measured(
    devices: dict[str, Device | Sshd],
    model_files: Files,
    light_python: Path,
    tmp_path: Path,
    stage: str,
    number: int,
) -> None:
    program, reached = pausing_python(tmp_path, light_python, STAGES[stage])
    saved = tmp_path / "out.json"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    words = [model_files("third.pte"), "--input_dims=1,3,4,4", "--iter=9", "--warmup=1"]
    words += [f"--device={name}" for name in devices]
    words += [f"--device-python={program}", f"--json={saved}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torchfuse", "bench", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary), **dict([MARK.split("=")])},
    )
    try:

        def arrived() -> list[Path]:
            return [path for there in devices.values() for path in there.tmp.glob("*/*")]

        until = arrived if stage == "push" else reached
        deadline = time.monotonic() + 60
        while len(until()) < len(devices):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if stage == "rounds":
            time.sleep(1)  # what was printed there is read here a moment later, on a busy machine
        process.send_signal(number)
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, printed) == (130, "")
    assert errors == SAID.format(saved)
    for there in devices.values():
        assert list(there.tmp.iterdir()) == []
        wait_until_none(there.processes)
    wait_until_none(lambda: marked(MARK))
    assert list(temporary.iterdir()) == []
    results = [result for run in json.loads(saved.read_text())["runs"] for result in run["results"]]
    assert [len(r["samples_s"]) for r in results] == (
        [5] * len(devices) if stage == "rounds" else []
    )


def test_a_run_on_this_machine_that_is_interrupted_leaves_no_process(
    model_files: Files, tmp_path: Path
) -> None:
    saved = tmp_path / "out.json"
    words = [model_files("third.pt"), "--input_dims=1,3,4,4", "--iter=100000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torchfuse", "bench", *words, "--warmup=1", f"--json={saved}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path), **dict([MARK.split("=")])},
    )
    try:
        deadline = time.monotonic() + 60
        while not (saved.exists() and '"samples_s"' in saved.read_text()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # as a CI job that takes too long is ended
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, printed, errors) == (130, "", SAID.format(saved))
    wait_until_none(lambda: marked(MARK))
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]


def test_ctrl_c_is_noticed_whatever_the_device_s_thread_is_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped = []

    def starts_processes(transport: Transport, *_: object, **__: object) -> None:
        deadline = time.monotonic() + 2
        with subprocess.Popen(["sh", "-c", f"sleep 0.05; kill -INT {os.getpid()}"]):
            with pytest.raises(DeviceError, match="stopped"):
                while time.monotonic() < deadline:
                    transport.shell("true")
        stopped.append(transport)

    monkeypatch.setattr(several, "bench_on", starts_processes)
    for _ in range(20):  # a wait without an end missed it in one try of three to twenty
        with pytest.raises(KeyboardInterrupt):
            several.bench_devices({}, ["local"], Settings(runner=Path("/bin/true")))
    assert len(stopped) == 20
