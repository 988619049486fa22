"""Linux machines by the system's own `ssh` and `scp`, over one connection.

The user's configuration, agents and jump hosts work as they do by hand.
"""

import contextlib
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from torchfuse.devices.transport import Transport
from torchfuse.errors import DeviceError, InputError

__all__ = ["Ssh"]

# What ssh prints → what is wrong and what to do; {host} is as it was named.
_ERRORS = (
    (
        r"Permission denied \(|Too many authentication failures|no such identity",
        "the machine takes none of your keys; make 'ssh {host}' work without a password first "
        "(ssh-copy-id {host})",
    ),
    (
        r"Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED|host key is known",
        "its host key is not known, or not the one that is; see for yourself with 'ssh {host}'",
    ),
    (r"Connection refused", "nothing answers at its port; start sshd there, or correct the port"),
    (
        r"Could not resolve hostname|Name or service not known",
        "there is no host of that name; correct it, or add it to your ssh configuration",
    ),
    (
        r"timed out|No route to host|Network is unreachable",
        "it does not answer; see that it is on, and in the same network",
    ),
    (
        r"write remote .*: Failure",  # all that sftp says of a full disk
        "no more can be written there, most likely since its disk is full; free some, or name a "
        "folder elsewhere with --device-folder",
    ),
    (
        r"Received message too long",
        "its shell prints something whenever it starts, which scp takes for an answer; see that "
        "'ssh {host} true' prints nothing (in ~/.bashrc, what prints is for interactive shells)",
    ),
    (
        r"Connection (to .* )?(closed|reset)|Broken pipe|lost connection|kex_exchange|"
        r"Timeout, server .* not responding|mux_client|Connection closed",
        "the connection was lost; check the network, and try again",
    ),
)


class Ssh(Transport):
    """A machine that `ssh HOST` reaches without a password."""

    base = '"${TMPDIR:-/tmp}"'

    def __init__(self, host: str, base: str | None = None) -> None:
        super().__init__(base)
        if not host or host.startswith("-") or re.search(r"[\s\0]", host):
            raise InputError(
                f"Expected a host as ssh takes it, such as ssh:pi@raspberrypi, got 'ssh:{host}'."
            )
        self.host = host
        self.name = f"ssh:{host}"
        self._sockets: str | None = None
        self._legacy_scp = False

    def __enter__(self) -> "Ssh":
        # Its own short folder: a socket's path may have about 100 characters.
        with contextlib.suppress(OSError):  # nothing can be written there: a connection each
            self._sockets = tempfile.mkdtemp(prefix="tf-", dir="/tmp")  # mode 0700
        try:
            super().__enter__()
        except BaseException:
            self._disconnect()
            raise
        return self

    def _disconnect(self) -> None:
        if self._sockets is None:
            return
        folder, self._sockets = self._sockets, None
        if any(Path(folder).iterdir()):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(  # noqa: S603  # words, not a shell
                    ["ssh", *self._shared(folder), "-O", "exit", "--", self.host],  # noqa: S607
                    capture_output=True,
                    timeout=10,
                    check=False,
                    stdin=subprocess.DEVNULL,
                )
        shutil.rmtree(folder, ignore_errors=True)

    def _shared(self, folder: str) -> list[str]:
        return ["-o", "ControlMaster=auto", "-o", f"ControlPath={folder}/%C"]

    def _options(self) -> list[str]:
        options = [
            *("-o", "BatchMode=yes"),  # nobody is asked anything
            *("-o", "ConnectTimeout=10"),
            *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
        ]
        if self._sockets is not None:
            options += [*self._shared(self._sockets), "-o", "ControlPersist=60"]
        return options

    def _shell_words(self, script: str) -> list[str]:
        # The login shell over there may be any; it only has to start sh.
        return ["ssh", *self._options(), "--", self.host, f"exec sh -c {shlex.quote(script)}"]

    def _copy_words(self, source: str, target: str, *, push: bool) -> list[str]:
        user, at, address = self.host.rpartition("@")
        host = f"{user}{at}[{address}]" if ":" in address else self.host  # IPv6
        pair = [source, f"{host}:{target}"] if push else [f"{host}:{source}", target]
        legacy = ["-O"] if self._legacy_scp else []
        return ["scp", "-q", *legacy, *self._options(), "--", *pair]

    def _copy(self, source: str, target: str, size: int | None, *, push: bool) -> None:
        try:
            super()._copy(source, target, size, push=push)
        except DeviceError as error:
            # Small systems have no sftp server, which scp wants unless told otherwise.
            if self._legacy_scp or not re.search(r"subsystem request failed|sftp", str(error)):
                raise
            self._legacy_scp = True
            super()._copy(source, target, size, push=push)

    def _explained(self, errors: str) -> str | None:
        for pattern, meaning in _ERRORS:
            if re.search(pattern, errors):
                return f"{meaning.format(host=self.host)}."
        return None
