"""What every transport does, on this machine: its own folder, its own end of a command."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from devices.processes import marked
from torchfuse.devices.local import Local
from torchfuse.devices.transport import Finished
from torchfuse.errors import DeviceError

STRANGE = "-a 'b\" ;c$(touch d)\n.bin"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder that private folders are made in, whose own name a shell would trip over."""
    folder = tmp_path / "it's; a $(folder)"
    folder.mkdir()
    return folder


@pytest.fixture(params=["dash", "bash", "mksh", "busybox sh"])
def shell(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The shells of Debian, of most servers, of Android, and of small boards."""
    words = str(request.param).split()
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    monkeypatch.setattr(Local, "_shell_words", lambda _, script: [*words, "-c", script])
    return str(request.param)


def test_a_command_gives_its_status_and_both_outputs_apart(shell: str, base: Path) -> None:
    with Local(str(base)) as here:
        ran = here.run(["sh", "-c", "echo out; echo err >&2; exit 7"], timeout_s=10)
    assert (ran.status, ran.stdout, ran.stderr) == (7, "out\n", "err\n")


def test_a_last_line_without_an_end_is_not_lost(shell: str, base: Path) -> None:
    with Local(str(base)) as here:
        assert here.run(["printf", "half a line"], timeout_s=10).stdout == "half a line"


def test_words_come_as_they_are_given(shell: str, base: Path) -> None:
    words = ["a b", "'", '"', ";", "$(x)", "`x`", "*", "-n", "\\", "\n", ""]
    with Local(str(base)) as here:
        printed = here.run(["printf", "%s|", *words], timeout_s=10).stdout
        assert printed == "".join(f"{word}|" for word in words)
        assert not list(Path(here.folder).iterdir())  # nothing was made, no substitution ran


@pytest.mark.parametrize(
    ("command", "status", "how"),
    [
        (["sh", "-c", "kill -SEGV $$"], 139, "by signal 11 (SIGSEGV)"),
        (["./none"], 127, "with status 127"),
        (["./text"], 126, "with status 126"),
    ],
)
def test_signals_and_missing_programs_are_told_apart(
    shell: str, base: Path, tmp_path: Path, command: list[str], status: int, how: str
) -> None:
    text = tmp_path / "text"
    text.write_text("no program")
    with Local(str(base)) as here:
        here.push(text, "text")
        ran = here.run(command, timeout_s=10)
    assert (ran.status, ran.how) == (status, how)


def test_what_takes_too_long_is_ended_with_all_that_it_started(shell: str, base: Path) -> None:
    with Local(str(base)) as here:
        started = time.monotonic()
        with pytest.raises(DeviceError, match=r"^local: the command was ended on the device after"):
            here.run(["sh", "-c", "WAITING=x sleep 1000 & WAITING=x sleep 1000"], timeout_s=1)
        assert time.monotonic() - started < 10
    assert marked("WAITING=x") == []


def test_nothing_runs_on_after_a_command(shell: str, base: Path) -> None:
    with Local(str(base)) as here:
        here.run(["sh", "-c", "exit 0"], timeout_s=1000)
        time.sleep(0.1)
        assert not [pid for pid in _children() if _command(pid).startswith("sleep")]


def test_lines_are_told_as_they_come_and_the_line_of_the_end_is_not(base: Path) -> None:
    came: list[tuple[str, float]] = []
    with Local(str(base)) as here:
        here.run(
            ["sh", "-c", "echo one; sleep 0.5; echo two"],
            timeout_s=10,
            on_line=lambda line: came.append((line, time.monotonic())),
        )
    assert [line for line, _ in came if line] == ["one", "two"]
    assert came[1][1] - came[0][1] > 0.3


def test_a_file_goes_there_and_back_whatever_it_is_called(base: Path, tmp_path: Path) -> None:
    (tmp_path / STRANGE).write_bytes(bytes(range(256)) * 1000)
    with Local(str(base)) as here:
        here.push(tmp_path / STRANGE, "0.bin")
        here.pull("0.bin", tmp_path / f"{STRANGE} back")
        assert [entry.name for entry in Path(here.folder).iterdir()] == ["0.bin"]
    assert (tmp_path / f"{STRANGE} back").read_bytes() == bytes(range(256)) * 1000


def test_the_private_folder_is_nobody_elses_and_gone_at_the_end(base: Path) -> None:
    with Local(str(base)) as here:
        folder = Path(here.folder)
        assert folder.stat().st_mode & 0o777 == 0o700
        assert folder.parent == base
    assert list(base.iterdir()) == []


def test_an_error_in_the_block_leaves_nothing_either(base: Path) -> None:
    with pytest.raises(ZeroDivisionError), Local(str(base)):
        raise ZeroDivisionError
    assert list(base.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_error_that_says_why(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(DeviceError, match=r"no folder can be made in .*; name one that can be"):
        Local(str(missing)).__enter__()


def test_what_another_thread_waits_for_is_stopped_and_cleaned_up(base: Path) -> None:
    here = Local(str(base))
    errors: list[str] = []

    def wait() -> None:
        try:
            with here:
                here.run(["sh", "-c", "STOPPED=x sleep 1000"], timeout_s=1000)
        except DeviceError as error:
            errors.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    _until(lambda: bool(marked("STOPPED=x")))
    here.stop()
    thread.join(timeout=20)
    assert errors == ["local: stopped."]
    assert marked("STOPPED=x") == []
    assert list(base.iterdir()) == []


def test_a_status_above_128_is_a_signal() -> None:
    assert Finished(137, "", "").signal == 9
    assert Finished(1, "", "").signal is None
    assert Finished(255, "", "").signal is None  # ssh's own


def _children() -> list[int]:
    mine = str(os.getpid())
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and entry.joinpath("stat").read_text().split()[3] == mine:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def _until(holds: object, timeout_s: float = 10) -> None:
    assert callable(holds)
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_command_that_comes_to_run_when_cleaning_has_begun_does_not(
    shell: str, base: Path
) -> None:
    # The connection was lost just after it was told: nobody would be left to end it.
    with Local(str(base)) as here:
        (Path(here.folder) / "closed").touch()
        here.run(["sh", "-c", "echo ran; touch ran"], timeout_s=1000)
        assert not (Path(here.folder) / "ran").exists()
        _until(lambda: not [pid for pid in _children() if _command(pid).startswith("sleep")])


@pytest.mark.parametrize("wait_s", [0.0, 0.003, 0.01, 0.03])
def test_a_shell_that_is_lost_at_any_moment_leaves_nothing_running(
    base: Path, monkeypatch: pytest.MonkeyPatch, wait_s: float
) -> None:
    monkeypatch.setenv("LOST", str(wait_s))
    # What the lost shell started holds our end open, until it is cleaned up.
    monkeypatch.setattr("torchfuse.devices.transport._DRAIN_S", 0.05)
    words = Local._shell_words

    def lost(self: Local, script: str) -> list[str]:
        if "sleep 1000" not in script:
            return words(self, script)
        return ["sh", "-c", f'sh -c "$0" & sleep {wait_s}; kill -9 $!; exit 0', script]

    monkeypatch.setattr(Local, "_shell_words", lost)
    for _ in range(3):
        with pytest.raises(DeviceError, match="the device was lost"), Local(str(base)) as here:
            here.run(["sleep", "1000"], timeout_s=1000)
    assert list(base.iterdir()) == []
    _until(lambda: marked(f"LOST={wait_s}") == [])
