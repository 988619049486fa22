"""Model files on disk: written whole or not at all, and what is said of one that was."""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torchfuse.errors import ArtifactError, InputError
from torchfuse.units import size

if TYPE_CHECKING:
    from torchfuse.delegation import Delegation
    from torchfuse.verifying.equivalence import Equivalence

__all__ = [
    "Artifact",
    "Precision",
    "check_destination",
    "check_destinations",
    "check_folder",
    "write_all_atomically",
    "write_atomically",
]

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]


@dataclass(frozen=True)
class Artifact:
    """A model file that was written, loaded back and run."""

    path: Path
    format: str  # its suffix without the dot
    precision: Precision
    size_bytes: int  # of all its files
    sha256: str  # of the file at `path`, as `sha256sum` prints it
    delegation: "Delegation | None" = None  # only for formats that have delegates
    equivalence: "Equivalence | None" = None  # with the model it was made from
    notes: tuple[str, ...] = ()  # what was done otherwise than asked, and why
    # Batch norms in the graph of the model and in that of the file; None: ExecuTorch's, which has
    # none left, since lowering folds them or turns them into other operators.
    batch_norms: int | None = None
    batch_norms_left: int | None = None
    computes_in: str | None = None  # here, of what is not int8, by the runtime; None: not said
    beside: tuple[Path, ...] = ()  # its other files, in the same folder: an `.xml` has a `.bin`
    verified_on: str | None = None  # what it was compared with the model on; None: not known

    def __str__(self) -> str:
        """What was written, in a few lines."""
        lines = [f"{self.path}: {self.precision} .{self.format}, {size(self.size_bytes)}"]
        lines.append(f"SHA-256 {self.sha256}")
        lines += [f"with {path}, which it needs beside it" for path in self.beside]
        if self.computes_in is not None:
            what = "what is not in int8" if self.precision == "int8" else "everything"
            lines.append(f"computes {what} in {self.computes_in} on this CPU, as the runtime says")
        if self.equivalence is not None:
            where = "" if self.verified_on is None else f" on {self.verified_on}"
            lines.append(f"compared with the model{where}: {self.equivalence}")
        if self.batch_norms:
            left = self.batch_norms_left or "none"
            lines.append(f"batch norms: {self.batch_norms} in the model, {left} in the file")
        if self.delegation is not None:
            lines.append(str(self.delegation))
        return "\n".join([*lines, *(f"The file was {note}." for note in self.notes)])


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write all of `data` to `path`, or leave everything as it was.

    The bytes go to a new file in the same folder, which is synced to disk and then renamed.

    Raises:
        ArtifactError: folder missing, no permission, disk full, or any other failure to write; a
            file that was there before is unchanged and nothing half-written is left behind.
    """
    write_all_atomically({path: data})


def write_all_atomically(files: Mapping[str | os.PathLike[str], bytes]) -> None:
    """Write several files as `write_atomically` does one: none is renamed until all are written."""
    for path in files:
        check_destination(path)
    # a symbolic link stays one: the file it names changes
    targets = {path: Path(os.path.realpath(path)) for path in files}
    parts = {
        path: target.with_name(f".{secrets.token_hex(8)}.part") for path, target in targets.items()
    }
    try:
        for path, data in files.items():
            try:
                _write_new(parts[path], data, targets[path])
            except OSError as error:
                raise _cannot_write(path, *_explain(error, targets[path], len(data))) from error
        for path, data in files.items():
            try:
                os.replace(parts[path], targets[path])
            except OSError as error:
                raise _cannot_write(path, *_explain(error, targets[path], len(data))) from error
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):  # gone after the rename, or never made
                part.unlink()
    for folder in {target.parent for target in targets.values()}:
        _sync_folder(folder)


def _write_new(path: Path, data: bytes, replaced: Path) -> None:
    """Write a new file, synced to disk, with the mode of what it will replace."""
    # 0o666 and not tempfile's 0o600: the user's umask decides who can read the model, and
    # whoever could read a file that is replaced.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        if replaced.exists():
            path.chmod(stat.S_IMODE(replaced.stat().st_mode))
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def check_destination(path: str | os.PathLike[str]) -> None:
    """Find out, before long work, whether a file can be written to `path`; leave no trace.

    Raises:
        ArtifactError: folder missing, no permission, a read-only file, or a folder of that name.
    """
    target = _resolved(path)
    if target.is_dir():
        raise _cannot_write(path, "it is a folder", "add a file name")
    if target.exists() and not target.is_file():
        # As root the rename would replace even /dev/null, for the whole system.
        raise _cannot_write(path, "it is a device or a pipe", "give the name of a file")
    if target.exists() and not _is_writable(target):
        # The rename alone would replace a read-only file without asking.
        raise _cannot_write(path, "the file is read-only", "choose another name")
    if not target.parent.is_dir():
        raise _cannot_write(path, f"the folder '{target.parent}' does not exist", "create it first")
    _require_writable_folder(path, target.parent)


def check_destinations(paths: Mapping[str, str | os.PathLike[str] | None]) -> None:
    """Find out, before long work, whether each option's file can be written; None: not asked for.

    Raises:
        ArtifactError: one of them cannot be written.
        InputError: two of them are the same file.
    """
    given = {option: path for option, path in paths.items() if path is not None}
    for path in given.values():
        check_destination(path)
    if len({_resolved(path) for path in given.values()}) < len(given):
        names = ", ".join(f"{option} {os.fspath(path)}" for option, path in given.items())
        raise InputError(f"Expected a file for each of {names}, got one twice.")


def check_folder(path: str | os.PathLike[str]) -> None:
    """Find out, before long work, whether files can be written into a folder; leave no trace.

    The folder need not exist: then it must be possible to make it, with those that it lies in.

    Raises:
        ArtifactError: it is a file, or lies in one, or there is no permission.
    """
    existing = _resolved(path)
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise _cannot_write(path, f"'{existing}' is no folder", "choose another name")
    _require_writable_folder(path, existing)


def _resolved(path: str | os.PathLike[str]) -> Path:
    """Return the path that a symbolic link leads to."""
    try:
        target = Path(os.path.realpath(path))
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            target.stat()
    except PermissionError as error:
        raise _cannot_write(
            path, "no permission to look into its folder", "choose a folder that is yours"
        ) from error
    except (OSError, ValueError) as error:  # too long, or with a null character
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise _cannot_write(path, f"{reason}", "choose another name") from error
    return target


def _require_writable_folder(path: str | os.PathLike[str], folder: Path) -> None:
    if not _is_writable(folder):
        raise _cannot_write(
            path, f"no permission to write in '{folder}'", "choose a folder that is yours"
        )


def _is_writable(path: Path) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _explain(error: OSError, target: Path, size: int) -> tuple[str, str]:
    match error.errno:
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"no permission to write in '{target.parent}'", "choose a folder that is yours"
        case errno.ENOSPC | errno.EDQUOT:
            return (
                f"the disk has no room for its {size:,} bytes",
                "free some space or choose a folder on another disk",
            )
        case errno.EFBIG:
            return "the file would be larger than allowed here", "raise the limit ('ulimit -f')"
    return f"{error.strerror or error}", "choose another name or folder"


def _cannot_write(path: str | os.PathLike[str], reason: str, advice: str) -> ArtifactError:
    return ArtifactError(
        f"Cannot write '{os.fspath(path)}': {reason}; {advice} (nothing was changed)."
    )


def _sync_folder(folder: Path) -> None:
    # Makes the rename itself durable. Not every system can sync a folder, and the file is whole
    # either way.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
