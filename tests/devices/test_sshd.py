"""The sshd of the tests, as the real ssh and scp find it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from devices.sshd import Sshd

STRANGE = "-a 'b\" ;c$(d)\n.bin"


def test_a_command_gives_its_status_and_both_outputs_apart(sshd: Sshd) -> None:
    ran = sshd.ssh("board", "echo out; echo err >&2; exit 7")
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, b"out\n", b"err\n")


def test_the_first_ssh_and_scp_on_the_path_lead_to_it(sshd: Sshd) -> None:
    assert shutil.which("ssh") == str(sshd.bin / "ssh")
    assert subprocess.run(["ssh", "board", "exit 5"], check=False).returncode == 5


def test_files_go_there_and_back(sshd: Sshd, tmp_path: Path) -> None:
    (tmp_path / STRANGE).write_bytes(bytes(range(256)) * 1000)
    assert sshd.scp("--", str(tmp_path / STRANGE), "board:/" + str(sshd.tmp)).returncode == 0
    assert sshd.scp("--", f"board:{sshd.tmp}/{STRANGE}", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back").read_bytes() == (tmp_path / STRANGE).read_bytes()


def test_its_temporary_files_are_in_a_folder_of_the_test(sshd: Sshd) -> None:
    made = Path(sshd.ssh("board", "mktemp -d").stdout.decode().strip())
    assert made.parent == sshd.tmp
    assert made.is_dir()


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("wrong-key", "Permission denied (publickey)"),
        ("unknown-host", "Host key verification failed"),
        ("changed-host", "REMOTE HOST IDENTIFICATION HAS CHANGED"),
        ("refused", "Connection refused"),
        ("nowhere", "Could not resolve hostname"),
    ],
)
def test_what_does_not_connect_has_status_255_and_says_why(
    sshd: Sshd, host: str, words: str
) -> None:
    ran = sshd.ssh(host, "true")
    assert ran.returncode == 255
    assert words in ran.stderr.decode()


def test_a_connection_dropped_amid_a_run_has_status_255(sshd: Sshd) -> None:
    process = subprocess.Popen(
        [sshd.bin / "ssh", "board", "echo half; sleep 1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"half\n"
    sshd.kill()
    process.communicate(timeout=10)
    assert process.returncode == 255
    assert sshd.ssh("board", "echo again").stdout == b"again\n"


def test_a_wire_cut_after_so_many_bytes_leaves_half_a_file(sshd: Sshd, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(5_000_000))
    sshd.wire.cut_in_after = 2_000_000
    assert sshd.scp(str(tmp_path / "big"), f"board:/{sshd.tmp}/big").returncode != 0
    assert 0 < (sshd.tmp / "big").stat().st_size < 5_000_000
    assert sshd.ssh("board", "true").returncode == 255
    sshd.wire.mend()
    assert sshd.ssh("board", "true").returncode == 0


def test_a_wire_that_is_frozen_makes_the_client_wait(sshd: Sshd) -> None:
    sshd.wire.freeze()
    with pytest.raises(subprocess.TimeoutExpired):
        sshd.ssh("board", "true", timeout_s=0.5)


def test_what_was_started_over_it_is_seen_and_ends_with_it(sshd: Sshd) -> None:
    sshd.ssh("board", "sleep 1000 > /dev/null 2>&1 < /dev/null & echo started")
    assert sshd.processes()
    sshd.stop()
    assert not sshd.processes()
