"""The real adb with a server of its own: its own port, its own keys, nothing of the user's."""

import contextlib
import dataclasses
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from devices.processes import dying_with_us, free_port, wait_until_open


@dataclasses.dataclass(frozen=True)
class AdbServer:
    """A running server. `env` has what adb needs to find it, and nothing that leads elsewhere."""

    port: int
    home: Path
    env: dict[str, str]

    def adb(
        self,
        *arguments: str,
        serial: str | None = None,
        input: bytes = b"",  # noqa: A002 - subprocess's name for it
        timeout_s: float = 30,
    ) -> subprocess.CompletedProcess[bytes]:
        """What `adb` made of the arguments, run with this server."""
        chosen = ["-s", serial] if serial else []
        return subprocess.run(
            ["adb", *chosen, *arguments],
            env=self.env,
            input=input,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )

    def state(self, serial: str) -> str | None:
        """What `adb devices` says of a device, None if it is not there."""
        lines = self.adb("devices").stdout.decode().splitlines()
        return dict(line.split("\t") for line in lines if "\t" in line).get(serial)

    def wait_for(self, serial: str, state: str | None, timeout_s: float = 30) -> None:
        """Returns once `adb devices` says so."""
        end = time.monotonic() + timeout_s
        while (now := self.state(serial)) != state:
            if time.monotonic() > end:
                raise TimeoutError(f"{serial} is {now}, expected {state}")
            time.sleep(0.02)


def settings(port: int) -> dict[str, str]:
    """Environment variables that keep adb to one server and to the devices it is told of."""
    return {
        "ANDROID_ADB_SERVER_PORT": str(port),
        "ADB_EMU": "0",
        "ADB_MDNS": "0",
        "ADB_USB": "0",
        "ADB_LOCAL_TRANSPORT_MAX_PORT": "0",
    }


MISLEADING = ("ANDROID_SERIAL", "ANDROID_ADB_SERVER_ADDRESS", "ADB_SERVER_SOCKET", "ADB_TRACE")


@contextlib.contextmanager
def running(home: Path) -> Iterator[AdbServer]:
    """An adb server that ends with the block, or with this process if it is killed."""
    port = free_port()
    env = {name: value for name, value in os.environ.items() if name not in MISLEADING}
    env |= settings(port) | {"HOME": str(home), "TMPDIR": str(home)}
    env.pop("ADB_VENDOR_KEYS", None)
    with (home / "adb.log").open("wb") as log:
        process = subprocess.Popen(
            [*dying_with_us(), "adb", "nodaemon", "server"],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            # Of its own session, since Ctrl-C is for the tool under test, which then needs it.
            start_new_session=True,
        )
    server = AdbServer(port, home, env)
    try:
        wait_until_open(port, process)
        yield server
    finally:
        # By its port too: a client starts another one where it finds none.
        server.adb("kill-server")
        process.kill()
        process.wait()
