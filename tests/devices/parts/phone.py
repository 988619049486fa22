"""An emulated arm64 phone: AOSP's adbd as the user "shell" in namespaces, its programs under qemu.

Nothing of it is visible on, or registered with, the machine it runs on, and all of it ends with the
process that started it.
"""

import contextlib
import dataclasses
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from devices.parts import adbd, arm64_root, debian
from devices.processes import dying_with_us, free_port, kill, lasting, wait_until_open

# qemu's default model has SVE, with which it computes int8 models wrongly.
CPU = "cortex-a76"
NEEDED = ["unshare", "nsenter", "chroot", "mount", "bash"]

UNSHARE = ["unshare", "--user", "--mount", "--pid", "--fork", "--kill-child"]
INIT = Path(__file__).with_name("phone_init.sh")


@dataclasses.dataclass
class Phone:
    """A phone that is on. `pid` is the first process in its namespaces."""

    pid: int
    root: Path
    port: int
    asks: bool  # whether adbd wants a key that it knows
    adbd: subprocess.Popen[bytes] | None = None

    @property
    def serial(self) -> str:
        """What adb calls it once it is connected."""
        return f"127.0.0.1:{self.port}"

    @property
    def files(self) -> Path:
        """This machine's path of the phone's root folder."""
        return Path(f"/proc/{self.pid}/root{self.root}")

    @property
    def tmp(self) -> Path:
        """This machine's path of the phone's /data/local/tmp."""
        return self.files / "data/local/tmp"

    def processes(self) -> dict[int, str]:
        """What runs on it, by this machine's numbers; not its first process, and not adbd."""
        return lasting(self._processes)

    def _processes(self) -> dict[int, str]:
        inside = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if os.readlink(folder / "ns/pid") == inside and "/opt/adbd/" not in command:
                    found[int(folder.name)] = command
        found.pop(self.pid, None)
        return found

    def command(self, *command: str, user: int = arm64_root.SHELL) -> list[str]:
        """A command for this machine that runs a command on the phone, past adb."""
        inside = ["nsenter", f"--target={self.pid}", "--user", "--mount", "--pid"]
        path = "/system/bin:/usr/bin:/bin"
        env = [f"PATH={path}", f"QEMU_CPU={CPU}", "TMPDIR=/data/local/tmp", "HOME=/"]
        root = ["chroot", f"--userspec={user}:{user}", str(self.root), "/usr/bin/env", "-i"]
        return [*inside, "--", *root, *env, *command]

    def start_adbd(self) -> None:
        """The cable is plugged in."""
        program = "adbd-auth" if self.asks else "adbd"
        here = "/opt/adbd"
        command = [f"{here}/ld.so", "--library-path", f"{here}/lib", f"{here}/{program}"]
        self.adbd = subprocess.Popen(
            [*dying_with_us(), *self.command(f"ADBD_PORT={self.port}", *command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until_open(self.port, self.adbd)

    def stop_adbd(self) -> None:
        """The cable comes off; what was running goes on."""
        assert self.adbd is not None
        kill([_child(self.adbd)])
        self.adbd.wait()
        self.adbd = None

    def trust(self, key: Path) -> None:
        """The person taps on "Always allow", for a public key of adb's."""
        keys = self.files / "data/misc/adb/adb_keys"
        keys.write_bytes(key.read_bytes())
        keys.chmod(0o644)


def obstacle() -> str | None:
    """Why there can be no phone here, None if there can be one."""
    tools = sorted({*NEEDED, *adbd.NEEDED, *arm64_root.NEEDED})
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not installed: as root, make test-devices does that"
    if not debian.KEYS.exists():
        return f"{debian.KEYS} is not there: apt-get install debian-archive-keyring"
    if os.geteuid():
        return "it takes root to map the users of a namespace"
    version = tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])
    if version < (6, 7):
        return f"a namespace has its own binfmt_misc since Linux 6.7; this is {platform.release()}"
    ran = subprocess.run(
        [*UNSHARE, "true"], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    return f"no namespaces here: {ran.stderr.strip()}" if ran.returncode else None


@contextlib.contextmanager
def running(*, asks: bool = False, space: str = "1g", torch: Path | None = None) -> Iterator[Phone]:
    """A phone that is off again after the block.

    `space` is how much fits on it. `torch` is a folder that it has as /opt/torch.
    """
    root, daemon, qemu = arm64_root.root(), adbd.adbd(), arm64_root.qemu()
    init = ["bash", str(INIT), str(root), str(daemon), str(torch or ""), str(qemu), space]
    outer = subprocess.Popen(
        [*dying_with_us(), *UNSHARE, *init],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the tool under test
    )
    phone = None
    with outer:
        try:
            assert outer.stdin is not None
            assert outer.stdout is not None
            pid = _child(outer)
            for ids in ("uid_map", "gid_map"):
                Path(f"/proc/{pid}/{ids}").write_text("0 0 65536\n")
            outer.stdin.write(b"go\n")
            outer.stdin.flush()
            if outer.stdout.readline() != b"up\n":
                raise RuntimeError(f"the phone does not start: {outer.communicate()[1].decode()}")
            phone = Phone(pid, root, free_port(), asks)
            phone.start_adbd()
            yield phone
        finally:
            if phone is not None:
                kill([phone.pid])  # with which all others inside end
            outer.kill()
            if phone is not None and phone.adbd is not None:
                phone.adbd.kill()
                phone.adbd.wait()


def _child(process: subprocess.Popen[bytes]) -> int:
    """The process that unshare or nsenter has forked, once there is one."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (found := children.read_text().split()):
        if process.poll() is not None:
            raise RuntimeError(f"{process.args} ended with {process.returncode}")
        time.sleep(0.001)
    return int(found[0])
