"""Model files on disk: written whole or not at all, sealed with a SHA-256, checked before loading.

A seal is a trailer after the last byte of the file proper. The ExecuTorch runtime reads as far as
its own header says and ignores it; in a zip archive (`.pt`, `.ptl`) it is the archive's comment.
So PyTorch's own loaders take a sealed file as it is.

    payload │ opening line │ metadata (JSON) │ its length (u32) │ SHA-256 │ closing line

The SHA-256 covers everything before it. It is there because a damaged `.pte` can load and run, and
give wrong outputs.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import secrets
import stat
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from torchfuse.errors import ArtifactError, InputError, UnsupportedError
from torchfuse.runner.interpreter import command_for, environment

if TYPE_CHECKING:
    from torchfuse.delegation import Delegation
    from torchfuse.equivalence import Equivalence

__all__ = [
    "Artifact",
    "CheckedFile",
    "Format",
    "Precision",
    "artifact_format",
    "check",
    "check_destination",
    "check_destinations",
    "check_folder",
    "check_options",
    "seal_pte",
    "seal_zip",
    "write_atomically",
]

Format = Literal["pte", "pt", "ptl"]
Precision = Literal["fp32", "fp16", "int8", "int4"]

_OPENING = b"torchfuse-seal-1\n"
_CLOSING = b"\nSEALED"
_LENGTH = struct.Struct("<I")
_SHA256_BYTES = 32

_ZIP_START = b"PK\x03\x04"
_ZIP_END = b"PK\x05\x06"
_ZIP_END_BYTES = 22  # of the end-of-central-directory record without a comment
_ZIP_COMMENT_LIMIT = 0xFFFF

# flatbuffer's root offset (u32), "ET" and two digits, "eh" and two digits, header length (u32),
# program size, segment base offset, segment data size (u64 each): executorch/runtime/executor and
# schema/extended_header.h
_PTE_HEADER = struct.Struct("<I4s4sIQQ")
_PTE_SEGMENT_SIZE = struct.Struct("<Q")
_PTE_HEADER_WITHOUT_SEGMENT_SIZE = 24  # its length field's value in files of older versions

_FIRST_LOAD_TIMEOUT_S = 120  # importing torch on a slow disk takes most of it


@dataclass(frozen=True)
class Artifact:
    """A model file that was written, loaded back and run."""

    path: Path
    format: Format
    precision: Precision
    size_bytes: int
    sha256: str  # of the whole file, as `sha256sum` prints it
    delegation: "Delegation | None" = None  # only for formats that have delegates
    equivalence: "Equivalence | None" = None  # with the model it was made from
    notes: tuple[str, ...] = ()  # what was done otherwise than asked, and why
    # Batch norms in the graph of the model and in that of the file; None: ExecuTorch's, which has
    # none left, since lowering folds them or turns them into other operators.
    batch_norms: int | None = None
    batch_norms_left: int | None = None

    def __str__(self) -> str:
        """What was written, in a few lines."""
        lines = [f"{self.path}: {self.precision} .{self.format}, {self.size_bytes / 1e3:.1f} kB"]
        lines.append(f"SHA-256 {self.sha256}")
        if self.equivalence is not None:
            lines.append(f"compared with the model: {self.equivalence}")
        if self.batch_norms:
            left = self.batch_norms_left or "none"
            lines.append(f"batch norms: {self.batch_norms} in the model, {left} in the file")
        if self.delegation is not None:
            lines.append(str(self.delegation))
        return "\n".join([*lines, *(f"The file was {note}." for note in self.notes)])


@dataclass(frozen=True)
class CheckedFile:
    """The bytes of a file that passed its checks; what is loaded must be these, not the path."""

    path: Path
    format: Format
    data: bytes
    metadata: Mapping[str, Any] | None  # None: not sealed by torchfuse


def artifact_format(path: str | os.PathLike[str]) -> Format:
    """Return the format that the file name's suffix asks for.

    Raises:
        ArtifactError: the suffix is not one of the known ones.
    """
    suffix = Path(path).suffix
    for known in get_args(Format):
        if suffix == f".{known}":
            return known  # type: ignore[no-any-return]  # get_args loses the type
    known_suffixes = ", ".join(f"'.{known}'" for known in get_args(Format))
    got = f"suffix '{suffix}'" if suffix else "no suffix"
    raise ArtifactError(
        f"Expected a file name that ends in one of {known_suffixes}, got '{path}' with {got}; "
        "'.pte' is for ExecuTorch, '.pt' for TorchScript, '.ptl' for the lite interpreter."
    )


def check_options(
    form: Format,
    precision: Precision | None,
    *,
    calibrated: bool = False,
    dynamic: bool = False,
    optimize: bool = True,
) -> None:
    """Find out, before there is a model, whether a file of this form can be what is asked for.

    Raises:
        InputError: the options contradict each other, or what the form is.
        UnsupportedError: the form has no such precision.
    """
    if precision == "int4":
        raise InputError(
            "int4 is a scheme of torchfuse.quantize: export what quantize(scheme='int4') returns."
        )
    if precision is not None and precision not in get_args(Precision):
        known = ", ".join(name for name in get_args(Precision) if name != "int4")
        raise InputError(f"Expected a precision of {known}, got {precision!r}.")
    if form != "pte" and precision == "fp16":
        raise UnsupportedError(
            f"'.{form}' has no fp16 on phones; use '.pte', or another precision."
        )
    if calibrated and precision != "int8":
        raise InputError(
            f"Calibration data is for int8, but the precision is {precision}; ask for int8, or "
            "give no calibration data."
        )
    if form == "pte" and not optimize:
        raise InputError(
            "ExecuTorch folds batch norms whenever it lowers a model, so there is no non-fused "
            "'.pte'; compare with eager mode, or with a non-fused '.pt'."
        )
    if form != "pte" and dynamic:
        raise InputError(f"'.{form}' takes inputs of any size; leave the dynamic sizes out.")


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write all of `data` to `path`, or leave everything as it was.

    The bytes go to a new file in the same folder, which is synced to disk and then renamed.

    Raises:
        ArtifactError: folder missing, no permission, disk full, or any other failure to write; a
            file that was there before is unchanged and nothing half-written is left behind.
    """
    check_destination(path)
    target = Path(os.path.realpath(path))  # a symbolic link stays one: the file it names changes
    beside = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        # 0o666 and not tempfile's 0o600: the user's umask decides who can read the model, and
        # whoever could read a file that is replaced.
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            if target.exists():
                beside.chmod(stat.S_IMODE(target.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except OSError as error:
        raise _cannot_write(path, *_explain(error, target, len(data))) from error
    finally:
        with contextlib.suppress(OSError):  # gone after the rename, or never made
            beside.unlink()
    _sync_folder(target.parent)


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


def seal_pte(program: bytes, metadata: Mapping[str, Any]) -> bytes:
    """Return the ExecuTorch program with a seal after it; stock runtimes load it as before."""
    return program + _trailer(program, metadata)


def seal_zip(archive: bytes, metadata: Mapping[str, Any]) -> bytes:
    """Return the zip archive (`.pt`, `.ptl`) with a seal as its comment; stock loaders take it.

    An archive comment, and not one more file in the archive, so that the checksum covers every
    byte: the local headers and the padding too, which no CRC of the archive protects.
    """
    assert archive[-_ZIP_END_BYTES:].startswith(_ZIP_END), "an archive that has no comment yet"
    length = len(_OPENING) + len(_encode(metadata)) + _LENGTH.size + _SHA256_BYTES + len(_CLOSING)
    assert length <= _ZIP_COMMENT_LIMIT, "metadata is a few lines"
    archive = archive[:-2] + struct.pack("<H", length)
    return archive + _trailer(archive, metadata)


def _trailer(payload: bytes, metadata: Mapping[str, Any]) -> bytes:
    encoded = _encode(metadata)
    body = _OPENING + encoded + _LENGTH.pack(len(encoded))
    digest = hashlib.sha256(payload)
    digest.update(body)
    return body + digest.digest() + _CLOSING


def _encode(metadata: Mapping[str, Any]) -> bytes:
    return json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()


def check(path: str | os.PathLike[str]) -> CheckedFile:
    """Read a model file and return its bytes, once they are known to be whole.

    A sealed file is compared with its checksum. Any other file has its header and size checked,
    and is then loaded and run for the first time in a child process, because the runtimes end the
    process on some damaged files.

    Raises:
        ArtifactError: missing or unreadable file, unknown suffix, truncated or damaged contents.
    """
    path = Path(path)
    form = artifact_format(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"Expected a model file, but '{path}' does not exist.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ArtifactError(
            f"Expected a model file, but '{path}' cannot be read: {reason}."
        ) from error
    if not data:
        raise _damaged(path, "it is empty")
    if data.endswith(_CLOSING):
        return CheckedFile(path, form, data, _unseal(path, form, data))
    if form == "pte":
        _check_pte(path, data)
    else:
        _check_zip(path, data, form)
    _first_load(path, form, hashlib.sha256(data).hexdigest())
    return CheckedFile(path, form, data, None)


def _unseal(path: Path, form: Format, data: bytes) -> Mapping[str, Any]:
    digest_start = len(data) - len(_CLOSING) - _SHA256_BYTES
    sealed = memoryview(data)[: max(digest_start, 0)]
    if hashlib.sha256(sealed).digest() != data[max(digest_start, 0) : -len(_CLOSING)]:
        raise _damaged(path, "its contents do not have the SHA-256 they were sealed with")
    length_start = digest_start - _LENGTH.size
    (length,) = _LENGTH.unpack_from(data, length_start)
    metadata = json.loads(data[length_start - length : length_start])
    if metadata.get("format", form) != form:
        raise ArtifactError(
            f"Expected a '.{form}' model in '{path}', but it was written as a "
            f"'.{metadata['format']}' one; give the file that suffix back."
        )
    assert isinstance(metadata, dict)
    return metadata


def _check_pte(path: Path, data: bytes) -> None:
    if len(data) < _PTE_HEADER.size:
        raise _damaged(path, f"{len(data)} bytes are too few for an ExecuTorch program")
    root, magic, header, header_length, program_size, segments_start = _PTE_HEADER.unpack_from(data)
    # load_program aborts the process on a wrong identifier, so it must not see one.
    if not (magic[:2] == b"ET" and magic[2:].isdigit()):
        raise _damaged(path, f"an ExecuTorch program has 'ET12' at byte 4, this has {magic!r}")
    if not (header[:2] == b"eh" and header[2:].isdigit()):
        raise _damaged(path, "its extended header, which holds its size, is missing")
    segments_size = 0
    if header_length > _PTE_HEADER_WITHOUT_SEGMENT_SIZE:
        if len(data) < _PTE_HEADER.size + _PTE_SEGMENT_SIZE.size:
            raise _damaged(path, f"{len(data)} bytes are too few for an ExecuTorch program")
        (segments_size,) = _PTE_SEGMENT_SIZE.unpack_from(data, _PTE_HEADER.size)
    size = max(program_size, segments_start + segments_size)
    if len(data) < size:
        raise _damaged(path, f"its header promises {size:,} bytes, but it has {len(data):,}")
    if root >= program_size or program_size < _PTE_HEADER.size:
        raise _damaged(path, "the sizes in its header contradict each other")
    if len(data) > size:  # ExecuTorch writes nothing there, so it was a seal
        raise _damaged(path, f"the {len(data) - size} bytes after the program are no whole seal")


def _check_zip(path: Path, data: bytes, form: Format) -> None:
    if not data.startswith(_ZIP_START):
        raise _damaged(path, "a TorchScript file is a zip archive, and this does not begin as one")
    end = data.rfind(_ZIP_END, 0, len(data) - _ZIP_END_BYTES + len(_ZIP_END))
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            bad = archive.testzip()
            names = {name.partition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError) as error:
        raise _damaged(path, f"its zip archive is not whole ({error})") from error
    (comment_length,) = struct.unpack_from("<H", data, end + _ZIP_END_BYTES - 2)
    after = end + _ZIP_END_BYTES
    if data.startswith(_OPENING, after) or len(data) != after + comment_length:
        raise _damaged(path, "the seal after the archive is cut off")
    if bad is not None:
        raise _damaged(path, f"'{bad}' in its zip archive does not match its CRC")
    needed = {"pt": ("constants.pkl", "data.pkl"), "ptl": ("bytecode.pkl", "data.pkl")}[form]
    for name in needed:
        if name not in names:
            loader = "TorchScript" if form == "pt" else "lite interpreter"
            raise ArtifactError(
                f"Expected a {loader} model in '{path}', but its archive has no '{name}'; "
                "torchfuse.export writes one, a state dict is not one."
            )


@functools.lru_cache(maxsize=64)  # one child per file and contents
def _first_load(path: Path, form: Format, _sha256: str) -> None:
    # A fresh interpreter and not a fork: a fork of a process with torch's threads can hang.
    try:
        child = subprocess.run(  # noqa: S603  # our own interpreter and module, no shell
            command_for("torchfuse.first_load", "main", form, str(path.resolve())),
            env=environment(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_FIRST_LOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _damaged(path, f"loading it did not end in {_FIRST_LOAD_TIMEOUT_S} s") from error
    if child.returncode < 0:
        raise _damaged(path, f"the runtime dies loading it (signal {-child.returncode})")
    if child.returncode > 0:
        lines = child.stderr.strip().splitlines() or ["no message"]
        raise _damaged(path, f"the runtime refuses it ({lines[-1]})")


def _damaged(path: Path, reason: str) -> ArtifactError:
    return ArtifactError(
        f"Expected a whole model file, but '{path}' is damaged or of another kind: {reason}; "
        "export the model again or copy the file again."
    )
