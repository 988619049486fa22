"""What a device can be told, however it is reached: push, pull, run, and leave nothing behind.

Everything happens in a private folder on the device, made when the transport is opened and removed
when it is closed. Files get names of our own there, so no name of the user's is ever read by a
shell. A command's output is what comes between two lines that are printed before and after it:
shells greet, and `adb shell` ends with 0 when the device is lost.
"""

import abc
import contextlib
import hashlib
import os
import re
import secrets
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from torchfuse.devices.printable import printable
from torchfuse.errors import DeviceError

__all__ = ["Finished", "Transport", "last_line"]

OnLine = Callable[[str], None]

_SHORT_S = 60.0  # for what takes a moment, on a slow link
_BYTES_PER_S = 200_000  # of the slowest link that a push is given time for
_GRACE_S = 15.0  # for the device to end a command by itself, before we do
_DRAIN_S = 5.0
_CLEAN_S = 20.0  # Ctrl-C waits for it
_WAITS_TO_CLEAN_S = (1.0, 3.0)
_MOST_CHARACTERS = 200_000_000  # of an output: far more than any runner prints
_TIMED_OUT = "timed-out"
_CLOSED = "closed"

# What the device's shell runs for `run`. The command has a process group of its own, so that
# whatever it started ends with it; the watchdog ends it when nobody else can, since the connection
# is lost. It is not under `timeout`, which has a group of its own.
#
# The connection may be lost at any moment, and this shell with it: so each of the two notes its own
# number before it does anything, and does nothing if cleaning has begun.
_RUN = """\
cd {folder} || exit_is 1
s=; command -v setsid >/dev/null 2>&1 && s=setsid
note='echo $$ >>pid; [ -e {closed} ] && exit;'
$s sh -c "$note"' exec "$@"' sh {command} </dev/null &
job=$!
w=
if [ -n "$s" ]; then
  setsid sh -c "$note"' sleep {seconds}; : >{timed_out}; kill -9 -'$job </dev/null >/dev/null 2>&1 &
  w=$!
fi
wait $job
status=$?
[ -n "$w" ] && {{ kill -9 -$w || kill -9 $w; wait $w; }} 2>/dev/null
[ -e {timed_out} ] && status={timed_out}
rm -f pid {timed_out}
exit_is $status
"""

_CLEAN = """\
cd {folder} 2>/dev/null || exit_is 0
: >{closed}
[ -e pid ] && for p in $(cat pid); do
  kill -9 -$p || kill -9 $p
done 2>/dev/null
cd /
rm -rf {folder}
"""

_HASH = "sha256sum {name} 2>/dev/null || toybox sha256sum {name} || busybox sha256sum {name}"


@dataclass(frozen=True)
class Finished:
    """A command on the device that came to its end."""

    status: int
    stdout: str
    stderr: str

    @property
    def signal(self) -> int | None:
        """The signal that ended it; None: it ended by itself."""
        return self.status - 128 if 128 < self.status < 160 else None

    @property
    def how(self) -> str:
        """How it ended: `with status 1`, `by signal 11 (SIGSEGV)`."""
        if self.signal is None:
            return f"with status {self.status}"
        return f"by signal {self.signal} ({signal.Signals(self.signal).name})"


class Transport(abc.ABC):
    """A way to one device; open it with `with`, which makes the private folder and removes it."""

    name: str  # as --device takes it
    base: str  # the device's folder for temporary files, in the device shell's own syntax

    def __init__(self, base: str | None = None) -> None:
        if base is not None:
            self.base = shlex.quote(base)
        self._folder: str | None = None
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False
        self._starting = threading.Lock()  # no process is started once it is stopped

    # What each kind of device does in its own way

    @abc.abstractmethod
    def _shell_words(self, script: str) -> list[str]:
        """Return the command, for this machine, that has the device's shell run a script."""

    @abc.abstractmethod
    def _copy_words(self, source: str, target: str, *, push: bool) -> list[str]:
        """Return the command, for this machine, that copies a file to or from the device."""

    @abc.abstractmethod
    def _explained(self, errors: str) -> str | None:
        """Return what went wrong with the device and what to do, by what the command printed."""

    # What all do alike

    def __enter__(self) -> "Transport":
        """Make the private folder.

        Raises:
            DeviceError: the device cannot be reached, or nothing can be written there.
        """
        name = f"torchfuse-{secrets.token_hex(8)}"
        try:
            made = self.shell(
                f'base={self.base}; umask 077; mkdir "$base/{name}" && cd "$base/{name}" && pwd'
            )
            folder = made.stdout.strip()
            if made.status or not folder.startswith("/"):
                raise DeviceError(
                    f"{self.name}: no folder can be made in {self.base}: "
                    f"{last_line(made.stderr) or 'no reason given'}; name one that can be written "
                    "to with --device-folder."
                )
        except BaseException:  # it may have been made all the same
            self._stopped = False
            with contextlib.suppress(DeviceError):
                self.shell(f"rm -rf {self.base}/{name}")
            raise
        self._folder = folder
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """End what still runs there, and remove the private folder."""
        if self._folder is None:
            return
        folder, self._folder = self._folder, None
        self._stopped = False
        try:
            self._clean(folder)
        except DeviceError as cleaning:
            if error is None:
                raise
            # What went wrong before is the news, and most likely the reason for this, too.
            if hasattr(error, "add_note"):
                error.add_note(f"What was pushed is left in {folder} there ({cleaning})")
        finally:
            self._disconnect()

    def stop(self) -> None:
        """Have whatever another thread waits for end with an error; it cleans up then."""
        with self._starting:
            self._stopped = True
            process = self._process
        if process is not None and process.poll() is None:
            _kill_group(process)

    def _clean(self, folder: str) -> None:
        script = _CLEAN.format(folder=shlex.quote(folder), closed=_CLOSED)
        # A device that was lost may be on its way back.
        for wait_s in _WAITS_TO_CLEAN_S:
            try:
                self.shell(script, _CLEAN_S)
            except DeviceError:
                time.sleep(wait_s)
            else:
                return
        self.shell(script, _CLEAN_S)

    def _disconnect(self) -> None:  # noqa: B027  # most have nothing to close
        """Close what was opened for several commands."""

    @property
    def folder(self) -> str:
        """The private folder on the device."""
        assert self._folder is not None, "the transport is open"
        return self._folder

    def push(self, source: Path, name: str) -> None:
        """Copy a file to the private folder under this name; compare its checksum there.

        Raises:
            DeviceError: it did not arrive, or not whole.
        """
        size = source.stat().st_size
        self._copy(str(source.resolve()), f"{self.folder}/{name}", size, push=True)
        expected = hashlib.sha256(source.read_bytes()).hexdigest()
        got = self.shell(
            f"cd {shlex.quote(self.folder)} && {_HASH.format(name=shlex.quote(name))}"
        ).stdout
        found = re.search(r"^\\?([0-9a-f]{64})\b", got, re.MULTILINE)
        if found is None:
            raise DeviceError(
                f"{self.name}: the device has no sha256sum, so that nobody can tell whether "
                f"'{source.name}' arrived whole; install toybox or busybox there."
            )
        if found[1] != expected:
            raise DeviceError(
                f"{self.name}: '{source.name}' arrived damaged: its SHA-256 there is {found[1]}, "
                f"here {expected}; check the cable or the connection, and try again."
            )

    def pull(self, name: str, target: Path) -> None:
        """Copy a file from the private folder.

        Raises:
            DeviceError: it is not there, or the device was lost.
        """
        self._copy(f"{self.folder}/{name}", str(target.resolve()), None, push=False)
        if not target.is_file():
            raise DeviceError(f"{self.name}: '{name}' is no file there, and one was to be pulled.")

    def shell(self, script: str, timeout_s: float = _SHORT_S) -> Finished:
        """Have the device's shell run a script of ours to its end.

        Raises:
            DeviceError: the device cannot be reached, was lost, or took too long.
        """
        return self._to_the_end(f"{script}\nexit_is $?\n", timeout_s, lambda _: None)

    def run(
        self, command: Sequence[str], *, timeout_s: float, on_line: OnLine = lambda _: None
    ) -> Finished:
        """Run a command in the private folder to its end, at most `timeout_s` seconds.

        Whatever it started ends with it. `on_line` is given each line of its output as it comes.

        Raises:
            DeviceError: the device was lost, or the command took too long; it was ended then.
        """
        script = _RUN.format(
            folder=shlex.quote(self.folder),
            command=" ".join(map(shlex.quote, command)),
            seconds=max(1, round(timeout_s)),
            timed_out=_TIMED_OUT,
            closed=_CLOSED,
        )
        return self._to_the_end(script, timeout_s + _GRACE_S, on_line)

    def _to_the_end(self, script: str, timeout_s: float, on_line: OnLine) -> Finished:
        token = secrets.token_hex(8)
        # An output that does not end its last line must not hide the line that tells the end. That
        # one ends with the token, since a connection may be lost in the middle of it.
        ending = f'exit_is() {{ echo; echo "{token} $1 {token}"; exit 0; }}'
        framed = f"{ending}\necho; echo {token}\n{script}"
        end = re.compile(rf"{token} (\d{{1,3}}|{_TIMED_OUT}) {token}")
        began = False
        ends: list[str] = []

        def line_came(line: str) -> None:
            nonlocal began
            if not began:
                began = line == token
            elif found := end.fullmatch(line):
                ends.append(found[1])
            elif not ends:
                on_line(line)

        status, stdout, stderr = self._here(self._shell_words(framed), timeout_s, line_came)
        if not ends:
            self._raise_explained(stderr + stdout)
            raise DeviceError(
                f"{self.name}: the device was lost, or its shell ended, before the command did "
                f"({last_line(stderr) or f'status {status}, no message'}); check the connection, "
                "and try again."
            )
        if ends[0] == _TIMED_OUT:
            raise DeviceError(
                f"{self.name}: the command was ended on the device after {timeout_s - _GRACE_S:g} "
                "s; give --timeout more seconds, or look there for what it waits for."
            )
        output = stdout.partition(f"{token}\n")[2]
        output = output[: output.index(f"{token} ")].removesuffix("\n")
        return Finished(int(ends[0]), output, stderr)

    def _copy(self, source: str, target: str, size: int | None, *, push: bool) -> None:
        timeout_s = _SHORT_S + (size or 50_000_000) / _BYTES_PER_S
        words = self._copy_words(source, target, push=push)
        status, stdout, stderr = self._here(words, timeout_s, lambda _: None)
        if status == 0:
            return
        printed = f"{stdout}\n{stderr}"
        if re.search(r"no space left|disk quota|write failed", printed, re.IGNORECASE):
            raise DeviceError(
                f"{self.name}: the device has no room for the {size or 0:,} bytes of "
                f"'{os.path.basename(source)}'; free some, or name a folder elsewhere with "
                "--device-folder."
            )
        self._raise_explained(printed)
        done = "pushed" if push else "pulled"
        raise DeviceError(
            f"{self.name}: '{os.path.basename(source)}' was not {done}: "
            f"{last_line(printed) or f'status {status}, no message'}."
        )

    def _raise_explained(self, printed: str) -> None:
        explained = self._explained(printed)
        if explained is not None:
            raise DeviceError(f"{self.name}: {explained}")

    def _here(
        self, words: Sequence[str], timeout_s: float, on_line: OnLine
    ) -> tuple[int, str, str]:
        """Run a command on this machine; return its status, stdout and stderr."""
        process = self._started(words)
        late = threading.Timer(timeout_s, _kill_group, [process])
        late.daemon = True
        started = time.monotonic()
        late.start()
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            output = _Reader(process.stdout, process, on_line)
            errors = _Reader(process.stderr, process)
            status = process.wait()
        finally:
            late.cancel()
            if process.poll() is None:
                _kill_group(process)
                process.wait()
        if self._stopped:
            raise DeviceError(f"{self.name}: stopped.")
        printed = output.text(), errors.text()
        for failed in (output.error, errors.error):
            if isinstance(failed, _TooMuchError):
                raise DeviceError(
                    f"{self.name}: the device printed more than {_MOST_CHARACTERS:,} characters, "
                    "which no runner does; see what it runs."
                ) from failed
            if failed is not None:
                raise failed
        if status == -signal.SIGKILL and time.monotonic() - started >= timeout_s:
            raise DeviceError(
                f"{self.name}: '{words[0]}' got no answer in {timeout_s:g} s; check the connection "
                "and that the device is awake."
            )
        return status, *printed

    def _started(self, words: Sequence[str]) -> "subprocess.Popen[str]":
        with self._starting:
            if self._stopped:
                raise DeviceError(f"{self.name}: stopped.")
            try:
                self._process = subprocess.Popen(  # noqa: S603  # words: no shell reads them here
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,  # whose lines end with \n, as those of old devices with \r\n do too
                    encoding="utf-8",
                    errors="replace",
                    start_new_session=True,  # Ctrl-C is for us, who then clean up on the device
                )
            except FileNotFoundError:
                raise DeviceError(
                    f"{self.name}: '{words[0]}' is not installed here; install it "
                    f"(Debian and Ubuntu: apt install {_PACKAGES.get(words[0], words[0])})."
                ) from None
            return self._process


_PACKAGES = {"ssh": "openssh-client", "scp": "openssh-client"}


def _kill_group(process: "subprocess.Popen[Any]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class _TooMuchError(Exception):
    """More was printed than can be meant."""


class _Reader(threading.Thread):
    """Reads a stream to its end, beside another, so that neither fills up and blocks its writer.

    What goes wrong meanwhile, in whoever is given the lines too, ends the writer and is `error`.
    """

    def __init__(
        self,
        stream: IO[str],
        writer: "subprocess.Popen[str]",
        on_line: OnLine = lambda _: None,
    ) -> None:
        super().__init__(daemon=True)
        self._stream, self._writer, self._on_line = stream, writer, on_line
        self._lines: list[str] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        left = _MOST_CHARACTERS
        try:
            with self._stream:
                while line := self._stream.readline(left + 1):
                    left -= len(line)
                    if left < 0:
                        raise _TooMuchError
                    self._lines.append(line)
                    self._on_line(line.rstrip("\r\n"))
        except Exception as error:  # noqa: BLE001  # raised by who waits for the writer
            self.error = error
            _kill_group(self._writer)

    def text(self) -> str:
        """Return what was read, once its writer has ended.

        Something that it started may live on and hold the stream open; nobody waits for that.
        """
        self.join(timeout=_DRAIN_S)
        return "".join(self._lines)


def last_line(text: str) -> str:
    """Return the last line that says something, without its full stop; empty: none does."""
    lines = [line for line in map(printable, text.splitlines()) if line and not _ADB.match(line)]
    return lines[-1].rstrip(".") if lines else ""


_ADB = re.compile(r"\* daemon ")  # what adb says when it has to start its server
