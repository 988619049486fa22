"""Debian's sshd on 127.0.0.1 with keys of its own, and a client configuration that leads to it."""

import contextlib
import getpass
import os
import shlex
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from devices.processes import (
    descendants,
    dying_with_us,
    free_port,
    kill,
    lasting,
    marked,
    wait_until_open,
)
from devices.wire import Wire

MARK = "TEST_SSHD"  # in the environment of every process that is started over it
SERVER = "/usr/sbin/sshd"
SFTP = "/usr/lib/openssh/sftp-server"
NEEDED = (SERVER, SFTP, "/usr/bin/ssh", "/usr/bin/scp", "/usr/bin/ssh-keygen")

# What is wrong with each name but the first two, which are the same well machine.
HOSTS = ("board", "board-2", "wrong-key", "unknown-host", "changed-host", "refused", "nowhere")


class Sshd:
    """A running sshd. `config` names the hosts in HOSTS; the clients in `bin` use it by themselves.

    `wire` lies between the client and the server: cut it, freeze it, mend it.
    """

    host = "board"

    def __init__(self, folder: Path, inside: Sequence[str] = ()) -> None:
        """With `inside`, commands run as its arguments: on another machine, as it were."""
        self.folder = folder
        self.inside = list(inside)
        self.tmp = folder / "board's tmp"  # the remote's TMPDIR
        self.bin = folder / "bin"
        self.config = folder / "ssh_config"
        self.name = uuid.uuid4().hex
        self.port = free_port()
        self.wire = Wire(self.port)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """What sshd had to say so far."""
        return (self.folder / "sshd.log").read_text()

    def processes(self) -> list[int]:
        """The processes that were started over it and that still run."""
        return lasting(self._marked)

    def _marked(self) -> list[int]:
        return marked(f"{MARK}={self.name}")

    def kill(self) -> None:
        """Drops every connection, and takes the next; what was started on the machine runs on."""
        self.wire.cut()
        self.wire.mend()

    def ssh(
        self,
        *arguments: str,
        input: bytes = b"",  # noqa: A002 - subprocess's name for it
        timeout_s: float = 30,
    ) -> subprocess.CompletedProcess[bytes]:
        """What `ssh` made of the arguments, with this configuration, asking nobody."""
        return self._ran("ssh", arguments, input, timeout_s)

    def scp(self, *arguments: str, timeout_s: float = 30) -> subprocess.CompletedProcess[bytes]:
        """What `scp` made of the arguments, likewise."""
        return self._ran("scp", arguments, b"", timeout_s)

    def _ran(
        self, program: str, arguments: tuple[str, ...], given: bytes, timeout_s: float
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [self.bin / program, "-o", "BatchMode=yes", *arguments],
            input=given,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )

    def start(self) -> None:
        self.tmp.mkdir()
        for key in ("host_key", "other_host_key", "key", "other_key"):
            command = [
                "/usr/bin/ssh-keygen",
                "-q",
                "-t",
                "ed25519",
                "-N",
                "",
                "-f",
                self.folder / key,
            ]
            subprocess.run(command, check=True)
        shutil.copy(self.folder / "key.pub", self.folder / "authorized_keys")
        (self.folder / "sshd_config").write_text(self._server_config())
        if self.inside:
            script = f'#!/bin/sh\nexec {shlex.join(self.inside)} "$SSH_ORIGINAL_COMMAND"\n'
            (self.folder / "inside").write_text(script)
            (self.folder / "inside").chmod(0o755)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd insists, as root
        with (self.folder / "sshd.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*dying_with_us(), SERVER, "-D", "-e", "-f", self.folder / "sshd_config"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the tool under test
            )
        wait_until_open(self.port, self._process)
        self.wire.start()
        self._write_client_config()

    def stop(self) -> None:
        """Ends whatever was started over it as well. A second time does nothing."""
        self.wire.stop()
        if self._process is not None and self._process.poll() is None:
            sessions = descendants(self._process.pid)
            self._process.kill()
            self._process.wait()
            kill([*sessions, *self._marked()])

    def _server_config(self) -> str:
        return "\n".join(
            [
                "ListenAddress 127.0.0.1",
                f"Port {self.port}",
                f'HostKey "{self.folder}/host_key"',
                f'AuthorizedKeysFile "{self.folder}/authorized_keys"',
                "PidFile none",
                "StrictModes no",  # the folder of a test may lie in one that others can write to
                "UsePAM no",
                "PermitRootLogin prohibit-password",
                "AuthenticationMethods publickey",
                "MaxStartups 100",
                f"ForceCommand '{self.folder}/inside'" if self.inside else "",
                f"Subsystem sftp {SFTP}",
                f'SetEnv {MARK}={self.name} "TMPDIR={self.tmp}"',
                "",
            ]
        )

    def _write_client_config(self) -> None:
        folder = self.folder
        address = f"[127.0.0.1]:{self.wire.port}"
        for file, key in (("known_hosts", "host_key"), ("changed_hosts", "other_host_key")):
            kind, value, *_ = (folder / f"{key}.pub").read_text().split()
            (folder / file).write_text(f"{address} {kind} {value}\n")
        (folder / "no_hosts").touch()
        (folder / "ssh_config").write_text(
            f"""\
Host wrong-key
    IdentityFile "{folder}/other_key"
Host unknown-host
    UserKnownHostsFile "{folder}/no_hosts"
Host changed-host
    UserKnownHostsFile "{folder}/changed_hosts"
Host refused
    Port {free_port()}
Host nowhere
    HostName nowhere.invalid
Host * !wrong-key
    IdentityFile "{folder}/key"
Host *
    HostName 127.0.0.1
    Port {self.wire.port}
    User {getpass.getuser()}
    IdentitiesOnly yes
    IdentityAgent none
    UserKnownHostsFile "{folder}/known_hosts"
    GlobalKnownHostsFile none
"""
        )
        self.bin.mkdir()
        for program in ("ssh", "scp"):
            path = self.bin / program
            path.write_text(f'#!/bin/sh\nexec /usr/bin/{program} -F "{self.config}" "$@"\n')
            path.chmod(0o755)


@contextlib.contextmanager
def running(folder: Path, inside: Sequence[str] = ()) -> Iterator[Sshd]:
    """An sshd that ends with the block, and all that was started over it as well."""
    server = Sshd(folder, inside)
    try:
        server.start()
        yield server
    finally:
        server.stop()
