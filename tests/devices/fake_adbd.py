"""A device for the real adb, with faults to switch on: the device's half of adb's protocol.

It listens on 127.0.0.1, answers the server that `adb` starts, and runs shell commands with /bin/sh
in a folder that stands for the device's file system. Paths such as /data/local/tmp are replaced by
folders in it on the way in, and back on the way out, so nothing needs root or a namespace.
"""

import asyncio
import contextlib
import dataclasses
import os
import platform
import re
import signal
import struct
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from devices.listener import Listener
from devices.processes import kill, lasting, marked

VERSION = 0x01000001  # since which the checksums of packets are not looked at
MAX_DATA = 256 * 1024
UNWRITABLE = "/sys/kernel"  # a folder in which nobody can make anything, not even root
FEATURES = "shell_v2,cmd,stat_v2,ls_v2,fixed_push_mkdir"
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)  # the packets of shell v2
TOKEN, PUBLIC_KEY = 1, 3  # the packets of AUTH
MARK = "FAKE_ADBD"  # in the environment of every process that the device's shell starts

# What the device has of its own. All other paths in a command are this machine's, for its tools.
TMP = "/data/local/tmp"
OWN = (TMP, "/data", "/sdcard", "/system", "/sys", "/proc/cpuinfo", "/proc/meminfo")
OWN_PATH = re.compile(rf"(?<![\w.\-/])({'|'.join(OWN)})(?![\w.\-])")

PROPERTIES = {
    "ro.product.manufacturer": "Fake",
    "ro.product.brand": "fake",
    "ro.product.model": "Fake Phone 8",
    "ro.product.name": "fake",
    "ro.product.device": "fake8",
    "ro.build.version.release": "14",
    "ro.build.version.sdk": "34",
    "ro.hardware": "fakeboard",
    "ro.soc.manufacturer": "Fake",
    "ro.soc.model": "FK8000",
    # This machine's, since what is pushed runs on it. A test of another architecture sets its own.
    "ro.product.cpu.abi": {"x86_64": "x86_64", "aarch64": "arm64-v8a"}.get(platform.machine(), "?"),
}
BATTERY = """\
Current Battery Service state:
  AC powered: false
  USB powered: true
  status: 2
  health: 2
  present: true
  level: 87
  scale: 100
  voltage: 4123
  temperature: 291
  technology: Li-ion
"""
GETPROP = """\
#!/bin/sh
# getprop, or getprop NAME [DEFAULT]
while IFS='=' read -r name value; do
    [ $# = 0 ] && echo "[$name]: [$value]"
    [ "$1" = "$name" ] && echo "$value" && exit
done < "${0%/bin/*}/build.prop"
[ $# = 0 ] || echo "$2"
"""
DUMPSYS = """\
#!/bin/sh
[ "$1" = battery ] && exec cat "${0%/bin/*}/battery"
echo "Can't find service: $1"
"""
KERNEL = {
    "sys/devices/system/cpu/possible": "0-3\n",
    "sys/devices/system/cpu/online": "0-3\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-0\n",
    "sys/class/thermal/thermal_zone0/temp": "41300\n",
    "sys/class/thermal/thermal_zone1/type": "battery\n",
    "sys/class/thermal/thermal_zone1/temp": "29100\n",
    "proc/cpuinfo": "".join(f"processor\t: {n}\n\n" for n in range(4)) + "Hardware\t: FK8000\n",
    "proc/meminfo": "MemTotal:        7812345 kB\nMemFree:          512345 kB\n"
    "MemAvailable:    3912345 kB\n",
} | {
    f"sys/devices/system/cpu/cpu{n}/cpufreq/{file}": f"{value}\n"
    for n in range(4)
    for file, value in {
        "scaling_governor": "schedutil",
        "scaling_cur_freq": 1200000,
        "cpuinfo_max_freq": 2800000,
    }.items()
}


@dataclasses.dataclass
class Faults:
    """What is wrong with the device. Set before or while it is used; a drop happens once."""

    unauthorized: bool = False  # the person has not tapped on "Allow" yet
    offline: bool = False  # answers nothing on a new connection
    drop_push_after: int | None = None  # bytes of file contents
    drop_pull_after: int | None = None
    drop_shell_after: int | None = None  # bytes of output
    returns: bool = False  # after a drop, the device listens again at once
    space: int | None = None  # bytes that pushes may still write
    read_only: bool = False  # /data/local/tmp is a folder that the kernel lets nobody write to
    corrupt_push: bool = False  # a bit of what is pushed is flipped, and nobody notices
    corrupt_pull: bool = False
    delay_s: float = 0.0  # before every packet that the device sends


class Device(Listener):
    """A device that listens from start() to stop()."""

    def __init__(
        self,
        root: Path,
        *,
        serial: str = "FAKE0001",
        properties: Mapping[str, str] | None = None,
        features: str = FEATURES,
    ) -> None:
        """With features="" a device as before Android 7: no exit status, one output, CRLF."""
        super().__init__()
        self.root, self.features, self.faults = root, features, Faults()
        self.properties = PROPERTIES | {"ro.serialno": serial} | dict(properties or {})
        self.name = uuid.uuid4().hex
        self.drops = 0  # how often the connection was dropped by a fault or by drop()
        self.commands: list[str] = []  # what the device's shell was given, as it came
        self.pushed: list[str] = []  # the paths of files that were pushed
        self.children: set[asyncio.subprocess.Process] = set()
        self._connections: set[Connection] = set()
        self._lay_out()

    @property
    def serial(self) -> str:
        """What adb calls the device once it is connected."""
        return f"127.0.0.1:{self.port}"

    @property
    def tmp(self) -> Path:
        """This machine's path of the device's /data/local/tmp."""
        return self.root / "data/local/tmp"

    def install(self, name: str, script: str) -> None:
        """Adds a program to the device's PATH, before this machine's."""
        path = self.root / "system/bin" / name
        path.write_text(script)
        path.chmod(0o755)

    def processes(self) -> list[int]:
        """The processes that the device's shell started and that still run."""
        return lasting(self._marked)

    def _marked(self) -> list[int]:
        return marked(f"{MARK}={self.name}")

    def allow(self) -> None:
        """The person taps on "Allow"."""
        self.faults.unauthorized = False
        self._do(self._each(lambda connection: connection.introduce()))

    def drop(self) -> None:
        """The cable comes off: connections are reset and none is taken until come_back()."""
        self._do(self._drop())

    def come_back(self) -> None:
        """Listens again, at the same port; adb's server finds it by itself within a second."""
        self.faults.offline = False
        self._do(self._come_back())

    def go_offline(self) -> None:
        """Takes connections, and answers nothing, until come_back()."""
        self.faults.offline = True
        self._do(self._come_back())

    def revoke(self) -> None:
        """The person takes back the permission, until allow()."""
        self.faults.unauthorized = True
        self._do(self._come_back())

    def stop(self) -> None:
        """Ends whatever its shell started as well. A second time does nothing."""
        if self._loop is None:
            return
        self.faults.returns = False
        self._do(self._drop())
        kill(self._marked())
        self._do(self._end())
        self._end_thread()

    def local(self, path: str) -> str:
        """This machine's path of a device's path."""
        path = os.path.normpath(f"/{path.lstrip('/')}")
        return OWN_PATH.sub(self._place, path, 1) if OWN_PATH.match(path) else f"{self.root}{path}"

    def local_command(self, command: str) -> str:
        """A shell command with this machine's paths."""
        return OWN_PATH.sub(self._place, command)

    def _place(self, match: re.Match[str]) -> str:
        read_only = match[1] == TMP and self.faults.read_only
        return UNWRITABLE if read_only else f"{self.root}{match[1]}"

    def _lay_out(self) -> None:
        for folder in ("data/local/tmp", "sdcard", "system/bin"):
            (self.root / folder).mkdir(parents=True)
        (self.root / "system/bin/sh").symlink_to("/bin/sh")
        (self.root / "system/build.prop").write_text(
            "".join(f"{name}={value}\n" for name, value in self.properties.items())
        )
        (self.root / "system/battery").write_text(BATTERY)
        for name, text in KERNEL.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(text)
        self.install("getprop", GETPROP)
        self.install("dumpsys", DUMPSYS)
        self.install("nproc", "#!/bin/sh\necho 4\n")
        self.install("toybox", '#!/bin/sh\nexec "$@"\n')

    async def _come_back(self) -> None:
        for connection in list(self._connections):
            connection.abort()
        await self._listen()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(self, reader, writer)
        self._connections.add(connection)
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)

    async def _each(self, act: Callable[["Connection"], Coroutine[Any, Any, None]]) -> None:
        for connection in list(self._connections):
            await act(connection)

    async def _drop(self) -> None:
        self.drops += 1
        if not self.faults.returns:
            self._stop_listening()
        for connection in list(self._connections):
            connection.abort()

    async def _end(self) -> None:
        for child in list(self.children):
            await child.wait()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            _, late = await asyncio.wait(others, timeout=5)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

    async def spend(self, fault: str, count: int) -> None:
        """Counts bytes towards a drop; drops and raises once they are spent."""
        left = getattr(self.faults, fault)
        if left is None:
            return
        setattr(self.faults, fault, left - count if left > count else None)
        if left <= count:
            await self._drop()
            raise ConnectionResetError


class Connection:
    """One connection from adb's server: packets in and out, and the streams opened over it."""

    def __init__(
        self, device: Device, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.device, self.reader, self.writer = device, reader, writer
        self.streams: dict[int, Stream] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.opened = 0

    def abort(self) -> None:
        self.writer.transport.abort()

    async def send(self, command: bytes, one: int, two: int, data: bytes = b"") -> None:
        await asyncio.sleep(self.device.faults.delay_s)
        magic = int.from_bytes(command, "little") ^ 0xFFFFFFFF
        check = sum(data) & 0xFFFFFFFF
        self.writer.write(command + struct.pack("<5I", one, two, len(data), check, magic) + data)
        await self.writer.drain()

    async def introduce(self) -> None:
        shown = ("ro.product.name", "ro.product.model", "ro.product.device")
        banner = "".join(f"{name}={self.device.properties[name]};" for name in shown)
        banner = f"device::{banner}features={self.device.features}"
        await self.send(b"CNXN", VERSION, MAX_DATA, banner.encode())

    async def serve(self) -> None:
        try:
            while True:
                head = await self.reader.readexactly(24)
                command, (one, two, size) = head[:4], struct.unpack("<3I", head[4:16])
                await self.take(command, one, two, await self.reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)
            self.abort()

    async def take(self, command: bytes, one: int, two: int, data: bytes) -> None:
        faults = self.device.faults
        if faults.offline:
            return
        if command in (b"CNXN", b"AUTH"):
            if faults.unauthorized:
                # Sign this; no signature is good enough, and with the key itself comes the dialog.
                if (command, one) != (b"AUTH", PUBLIC_KEY):
                    await self.send(b"AUTH", TOKEN, 0, os.urandom(20))
            else:
                await self.introduce()
        elif command == b"OPEN":
            self.open(one, data.rstrip(b"\0").decode(errors="surrogateescape"))
        elif stream := self.streams.get(two):
            if command == b"WRTE":
                stream.reader.feed_data(data)
                await self.send(b"OKAY", stream.mine, stream.theirs)
            elif command == b"OKAY":
                stream.ready.set()
            elif command == b"CLSE":
                self.streams.pop(stream.mine)
                stream.task.cancel()

    def open(self, theirs: int, service: str) -> None:
        self.opened += 1
        stream = self.streams[self.opened] = Stream(self, self.opened, theirs)
        stream.task = asyncio.create_task(stream.serve(service))
        self.tasks.add(stream.task)
        stream.task.add_done_callback(self.tasks.discard)


class Stream:
    """One service that adb opened: a shell command, or files to copy."""

    task: asyncio.Task[None]

    def __init__(self, connection: Connection, mine: int, theirs: int) -> None:
        self.connection, self.mine, self.theirs = connection, mine, theirs
        self.device = connection.device
        self.reader = asyncio.StreamReader()
        self.ready = asyncio.Event()

    async def serve(self, service: str) -> None:
        kind, _, rest = service.partition(":")
        kind, *options = kind.split(",")
        try:
            if kind not in ("shell", "exec", "sync"):
                await self.connection.send(b"CLSE", 0, self.theirs)
                return
            await self.connection.send(b"OKAY", self.mine, self.theirs)
            self.ready.set()
            if kind == "sync":
                await self.sync()
            else:
                await self.shell(
                    rest, framed="v2" in options, crlf=kind == "shell" and "v2" not in options
                )
            await self.connection.send(b"CLSE", self.mine, self.theirs)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.connection.streams.pop(self.mine, None)

    async def write(self, data: bytes) -> None:
        """Sends data, a packet at a time, each after adb has taken the one before."""
        for start in range(0, len(data), MAX_DATA):
            await self.ready.wait()
            self.ready.clear()
            part = data[start : start + MAX_DATA]
            await self.connection.send(b"WRTE", self.mine, self.theirs, part)

    # The shell.

    async def shell(self, command: str, *, framed: bool, crlf: bool) -> None:
        device = self.device
        device.commands.append(command)
        path = f"{device.root}/system/bin:/usr/local/bin:/usr/bin:/bin"
        process = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            device.local_command(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if framed else subprocess.STDOUT,
            cwd=device.root,
            env={"PATH": path, "TMPDIR": f"{device.tmp}", "HOME": "/", MARK: device.name},
            start_new_session=True,
        )
        device.children.add(process)
        tasks = [asyncio.create_task(self.copy_in(process.stdin, framed))]
        for kind, output in ((STDOUT, process.stdout), (STDERR, process.stderr)):
            if output is not None:
                tasks.append(asyncio.create_task(self.copy_out(output, kind, framed, crlf)))
        try:
            await asyncio.gather(*tasks[1:])
            status = await process.wait()
            device.children.discard(process)
            if framed:
                await self.write(packet(EXIT, bytes([status if status >= 0 else 128 - status])))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if process.returncode is None:
                # As adbd does when its host has gone: the shell alone is told, not what it started.
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGHUP)
            # Closed, so that a process that ignores it does not wait on a full pipe either.
            for number in range(3):
                if pipe := process._transport.get_pipe_transport(number):
                    pipe.close()

    async def copy_out(
        self, output: asyncio.StreamReader, kind: int, framed: bool, crlf: bool
    ) -> None:
        async for data in device_paths(output, str(self.device.root).encode()):
            shown = data.replace(b"\n", b"\r\n") if crlf else data
            left = self.device.faults.drop_shell_after
            if left is not None and left < len(shown):
                shown = shown[:left]
            await self.write(packet(kind, shown) if framed else shown)
            await self.ready.wait()  # taken: nothing of it is lost if the cable comes off now
            await self.device.spend("drop_shell_after", len(shown))

    async def copy_in(self, stdin: asyncio.StreamWriter, framed: bool) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                if framed:
                    kind, size = struct.unpack("<BI", await self.reader.readexactly(5))
                    data = await self.reader.readexactly(size)
                else:
                    kind, data = STDIN, await self.reader.read(MAX_DATA)
                if kind == CLOSE_STDIN or (kind == STDIN and not data):
                    stdin.close()
                elif kind == STDIN:
                    stdin.write(data)
                    await stdin.drain()

    # Files.

    async def sync(self) -> None:
        while True:
            command, size = struct.unpack("<4sI", await self.reader.readexactly(8))
            if command == b"QUIT":
                return
            name = (await self.reader.readexactly(size)).decode(errors="surrogateescape")
            if command == b"SEND":
                await self.receive(*name.rsplit(",", 1))
            elif command == b"RECV":
                await self.give(name)
            elif command in (b"LIST", b"LIS2"):
                await self.list(name, b"DENT" if command == b"LIST" else b"DNT2")
            elif command in (b"STAT", b"LST2", b"STA2"):
                path = self.device.local(name)
                await self.write(command + state(path, command))
            else:
                await self.fail(f"unknown command {command!r}")
                return

    async def fail(self, text: str) -> None:
        await self.write(b"FAIL" + struct.pack("<I", len(text.encode())) + text.encode())

    async def receive(self, name: str, mode: str) -> None:
        """Takes a file that is pushed, to the end even if it cannot be written."""
        device = self.device
        device.pushed.append(name)
        path = device.local(name)
        trouble = ""
        file = None
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            file = open(path, "wb")  # noqa: SIM115 - a device may block
        except OSError as error:
            trouble = f"couldn't create file: {error.strerror}"
        try:
            while True:
                command, size = struct.unpack("<4sI", await self.reader.readexactly(8))
                if command == b"DONE":
                    break
                data = await self.reader.readexactly(size)
                if device.faults.corrupt_push:
                    device.faults.corrupt_push = False
                    data = flipped(data)
                if file and not trouble:
                    if (space := device.faults.space) is not None:
                        device.faults.space = max(0, space - len(data))
                        if space < len(data):
                            data, trouble = data[:space], "write failed: No space left on device"
                    file.write(data)
                    file.flush()
                await device.spend("drop_push_after", len(data))
        finally:
            if file:
                file.close()
        if trouble:
            await self.fail(trouble)
            return
        os.chmod(path, int(mode) & 0o777)
        os.utime(path, (size, size))  # DONE carries the time in place of a size
        await self.write(b"OKAY" + struct.pack("<I", 0))

    async def give(self, name: str) -> None:
        device = self.device
        try:
            contents = Path(device.local(name)).read_bytes()
        except OSError as error:
            await self.fail(f"open failed: {error.strerror}")
            return
        if device.faults.corrupt_pull:
            device.faults.corrupt_pull = False
            contents = flipped(contents)
        for start in range(0, len(contents), 64 * 1024):
            part = contents[start : start + 64 * 1024]
            await self.write(b"DATA" + struct.pack("<I", len(part)) + part)
            await self.ready.wait()
            await device.spend("drop_pull_after", len(part))
        await self.write(b"DONE" + struct.pack("<I", 0))

    async def list(self, name: str, kind: bytes) -> None:
        folder = self.device.local(name)
        for entry in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            shown = os.fsencode(entry)
            packed = state(os.path.join(folder, entry), kind)
            await self.write(kind + packed + struct.pack("<I", len(shown)) + shown)
        await self.write(b"DONE" + bytes(len(state("/", kind)) + 4))


def packet(kind: int, data: bytes) -> bytes:
    """A packet of shell v2."""
    return struct.pack("<BI", kind, len(data)) + data


def flipped(data: bytes) -> bytes:
    """The data with one bit of the last byte changed."""
    return data[:-1] + bytes([data[-1] ^ 1]) if data else data


def state(path: str, command: bytes) -> bytes:
    """What STAT, LST2, STA2 or a listing says of a path, after the four letters."""
    long = command.endswith(b"2")
    try:
        found = os.stat(path) if command == b"STA2" else os.lstat(path)
    except OSError as error:
        return struct.pack("<I", error.errno or 5) + bytes(64) if long else bytes(12)
    if not long:
        return struct.pack("<3I", found.st_mode, found.st_size & 0xFFFFFFFF, int(found.st_mtime))
    ids = (found.st_mode, found.st_nlink & 0xFFFFFFFF, found.st_uid, found.st_gid)
    times = (int(found.st_atime), int(found.st_mtime), int(found.st_ctime))
    return struct.pack("<I2Q4IQ3q", 0, found.st_dev, found.st_ino, *ids, found.st_size, *times)


async def device_paths(output: asyncio.StreamReader, root: bytes) -> AsyncIterator[bytes]:
    """The output as it comes, without the folder that the device's file system is in."""
    held = b""
    while data := await output.read(64 * 1024):
        held = (held + data).replace(root, b"")
        # A piece may end within the folder's name.
        cut = next((n for n in range(len(root) - 1, 0, -1) if held.endswith(root[:n])), 0)
        if shown := held[: len(held) - cut]:
            yield shown
        held = held[len(held) - cut :]
    if held:
        yield held
