"""The ssh transport against Debian's sshd."""

import re
import sys
import threading
import time
from pathlib import Path

import pytest

from devices.sshd import Sshd
from torchfuse.devices.facts import facts_of
from torchfuse.devices.ssh import Ssh
from torchfuse.errors import DeviceError, InputError

# Whether ssh says why depends on which of its processes notices first.
LOST = "^ssh:board: the (device|connection) was lost"
STRANGE = "-a 'b\" ;c$(touch d):e\n.bin"


def test_push_run_pull_and_nothing_is_left(sshd: Sshd, tmp_path: Path) -> None:
    (tmp_path / STRANGE).write_bytes(bytes(range(256)) * 1000)
    with Ssh("board") as board:
        assert Path(board.folder).parent == sshd.tmp  # whose name has a quote and a space
        board.push(tmp_path / STRANGE, "0.bin")
        ran = board.run(["sh", "-c", "cp 0.bin 1.bin; echo it is; exit 3"], timeout_s=20)
        board.pull("1.bin", tmp_path / "back")
    assert (ran.status, ran.stdout) == (3, "it is\n")
    assert (tmp_path / "back").read_bytes() == (tmp_path / STRANGE).read_bytes()
    assert list(sshd.tmp.iterdir()) == []
    assert sshd.processes() == []


def test_all_commands_share_one_connection(sshd: Sshd) -> None:
    with Ssh("board") as board:
        for _ in range(3):
            board.shell("true")
        board.run(["true"], timeout_s=20)
    assert sshd.log.count("Accepted publickey") == 1


def test_it_says_what_it_is(sshd: Sshd) -> None:
    facts = facts_of(Ssh("board"))
    assert (facts.name, facts.state, facts.emulated) == ("ssh:board", "ready", False)
    assert facts.cores is not None
    assert facts.memory_bytes is not None
    assert facts.memory_bytes > 1e9


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("wrong-key", r"^ssh:wrong-key: the machine takes none of your keys; make 'ssh wrong-key'"),
        ("unknown-host", r"^ssh:unknown-host: its host key is not known, or not the one"),
        ("changed-host", r"^ssh:changed-host: its host key is not known, or not the one"),
        ("refused", r"^ssh:refused: nothing answers at its port; start sshd there"),
        ("nowhere", r"^ssh:nowhere: there is no host of that name; correct it"),
    ],
)
def test_what_does_not_connect_says_what_to_do(sshd: Sshd, host: str, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        Ssh(host).__enter__()
    with pytest.raises(DeviceError, match=message):
        facts_of(Ssh(host))


@pytest.mark.parametrize("host", ["", "-oProxyCommand=touch x", "a b", "a\nb"])
def test_a_host_that_ssh_would_take_for_something_else_is_refused(host: str) -> None:
    with pytest.raises(InputError, match="Expected a host as ssh takes it"):
        Ssh(host)


def test_a_connection_dropped_amid_a_run_is_an_error_and_cleaned_up_when_it_is_back(
    sshd: Sshd,
) -> None:
    cut = threading.Timer(1.0, sshd.wire.cut)
    back = threading.Timer(2.0, sshd.wire.mend)
    cut.start()
    back.start()
    with pytest.raises(DeviceError, match=LOST), Ssh("board") as board:
        board.run(["sh", "-c", "echo half; sleep 1000"], timeout_s=1000)
    assert list(sshd.tmp.iterdir()) == []
    assert sshd.processes() == []


@pytest.mark.usefixtures("lost_for_good")
def test_a_machine_that_stays_away_is_said_to_keep_what_was_pushed(sshd: Sshd) -> None:
    with pytest.raises(DeviceError, match=LOST) as caught, Ssh("board") as board:
        threading.Timer(0.5, sshd.wire.cut).start()
        board.run(["sleep", "1000"], timeout_s=3)
    if sys.version_info >= (3, 11):
        (note,) = caught.value.__notes__
        assert re.match(r"What was pushed is left in .*torchfuse-[0-9a-f]{16} there \(ssh:", note)
    deadline = time.monotonic() + 10  # the watchdog over there ends the command all the same
    while any("sleep 1000" in _command(pid) for pid in sshd.processes()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_connection_dropped_amid_a_push_is_an_error(sshd: Sshd, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(3_000_000))
    with Ssh("board") as board:
        sshd.wire.cut_in_after = 1_000_000
        with pytest.raises(DeviceError, match=r"^ssh:board: the connection was lost"):
            board.push(large, "large")
        sshd.wire.mend()


def test_what_takes_too_long_is_ended_over_there(sshd: Sshd) -> None:
    with Ssh("board") as board:
        with pytest.raises(DeviceError, match="was ended on the device after 1 s; give --timeout"):
            board.run(["sleep", "1000"], timeout_s=1)
        assert not any("sleep" in _command(pid) for pid in sshd.processes())


def test_a_full_disk_over_there_is_an_error_that_says_so(sshd: Sshd, tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(bytes(1000))
    with Ssh("board") as board:
        (Path(board.folder) / "full").symlink_to("/dev/full")
        with pytest.raises(
            DeviceError, match="no more can be written there, most likely since its disk"
        ):
            board.push(source, "full")


def test_a_read_only_folder_over_there_is_an_error_that_names_the_option(sshd: Sshd) -> None:
    with pytest.raises(DeviceError, match=r"no folder can be made in /proc/1: .*--device-folder"):
        Ssh("board", "/proc/1").__enter__()


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
