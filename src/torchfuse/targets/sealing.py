"""Seals: metadata and a SHA-256 in a model file, where its runtime's own loader ignores them.

Three places, by format. After the last byte of a `.pte`, whose runtime reads as far as its header
says; in the comment of a zip archive; and, as text, wherever a format takes a text at its end.

    payload │ opening line │ metadata (JSON) │ its length (u32) │ SHA-256 │ closing line

The SHA-256 covers everything before it. It is there because a damaged `.pte` can load and run, and
give wrong outputs.
"""

import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torchfuse.errors import ArtifactError

__all__ = [
    "CLOSING",
    "OPENING",
    "ZipSeal",
    "check_form",
    "check_zip",
    "damaged",
    "digests",
    "seal_pte",
    "seal_zip",
    "sealed_text",
    "unseal_binary",
    "unseal_text",
]

OPENING = b"torchfuse-seal-1\n"
CLOSING = b"\nSEALED"
_LENGTH = struct.Struct("<I")
_SHA256_BYTES = 32
# A seal as text: {"sha256": …, "metadata": …} after the opening word, on one line.
_TEXT_OPENING = b"torchfuse-seal-1 "
_TEXT_CLOSING = b" SEALED"

_ZIP_START = b"PK\x03\x04"
_ZIP_END = b"PK\x05\x06"
_ZIP_END_BYTES = 22  # of the end-of-central-directory record without a comment
_ZIP_COMMENT_LIMIT = 0xFFFF


def damaged(path: Path, reason: str) -> ArtifactError:
    """Return the error for a file that is not what was written, or no model at all."""
    return ArtifactError(
        f"Expected a whole model file, but '{path}' is damaged or of another kind: {reason}; "
        "export the model again or copy the file again."
    )


def check_form(path: Path, form: str, metadata: Mapping[str, Any]) -> None:
    """Raise ArtifactError if the metadata is that of another format."""
    if metadata.get("format", form) != form:
        raise ArtifactError(
            f"Expected a '.{form}' model in '{path}', but it was written as a "
            f"'.{metadata['format']}' one; give the file that suffix back."
        )


def seal_pte(program: bytes, metadata: Mapping[str, Any]) -> bytes:
    """Return the ExecuTorch program with a seal after it; stock runtimes load it as before."""
    return program + _trailer(program, metadata)


def seal_zip(archive: bytes, metadata: Mapping[str, Any]) -> bytes:
    """Return the zip archive with a seal as its comment; stock loaders take it.

    An archive comment, and not one more file in the archive, so that the checksum covers every
    byte: the local headers and the padding too, which no CRC of the archive protects.
    """
    assert archive[-_ZIP_END_BYTES:].startswith(_ZIP_END), "an archive that has no comment yet"
    length = len(OPENING) + len(_encode(metadata)) + _LENGTH.size + _SHA256_BYTES + len(CLOSING)
    assert length <= _ZIP_COMMENT_LIMIT, "metadata is a few lines"
    archive = archive[:-2] + struct.pack("<H", length)
    return archive + _trailer(archive, metadata)


class ZipSeal:
    """For targets whose file is one zip archive: a seal as its comment."""

    suffix: str

    def seal(self, files: Mapping[str, bytes], metadata: Mapping[str, Any]) -> dict[str, bytes]:
        """Return the archive with a seal as its comment."""
        return {self.suffix: seal_zip(files[self.suffix], metadata)}

    def unseal(self, path: Path, files: Mapping[str, bytes]) -> Mapping[str, Any] | None:
        """Return what is in the seal in the archive's comment."""
        return unseal_binary(path, files[self.suffix])


def _trailer(payload: bytes, metadata: Mapping[str, Any]) -> bytes:
    encoded = _encode(metadata)
    body = OPENING + encoded + _LENGTH.pack(len(encoded))
    digest = hashlib.sha256(payload)
    digest.update(body)
    return body + digest.digest() + CLOSING


def _encode(metadata: Mapping[str, Any]) -> bytes:
    return json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()


def unseal_binary(path: Path, data: bytes) -> Mapping[str, Any] | None:
    """Return the metadata of what `seal_pte` and `seal_zip` sealed; None: there is no seal.

    Raises:
        ArtifactError: there is one, and it is not that of these bytes.
    """
    if not data.endswith(CLOSING):
        return None
    digest_start = len(data) - len(CLOSING) - _SHA256_BYTES
    sealed = memoryview(data)[: max(digest_start, 0)]
    if hashlib.sha256(sealed).digest() != data[max(digest_start, 0) : -len(CLOSING)]:
        raise damaged(path, "its contents do not have the SHA-256 they were sealed with")
    length_start = digest_start - _LENGTH.size
    (length,) = _LENGTH.unpack_from(data, length_start)
    metadata = json.loads(data[length_start - length : length_start])
    assert isinstance(metadata, dict)
    return metadata


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the SHA-256 of each of the files beside the first, to be kept in the first's seal."""
    return {suffix: hashlib.sha256(data).hexdigest() for suffix, data in files.items()}


def sealed_text(payload: bytes, metadata: Mapping[str, Any]) -> str:
    """Return a seal over `payload` as one line of text, for formats that take a text at the end."""
    # "--" ends a comment in XML, and stands in JSON within strings only, where it has another form.
    body = _encode(metadata).replace(b"--", b"-\\u002d")
    digest = hashlib.sha256(payload)
    digest.update(body)
    return f"{_TEXT_OPENING.decode()}{body.decode()} {digest.hexdigest()}{_TEXT_CLOSING.decode()}"


def unseal_text(
    path: Path, data: bytes, end: bytes, payload: Callable[[bytes], bytes]
) -> Mapping[str, Any] | None:
    """Return the metadata of a file that ends in a text of `sealed_text` and `end`.

    `payload` is given what comes before the text, and returns what it was made over.

    Raises:
        ArtifactError: there is such a text, and it is not that of these bytes.
    """
    start = data.rfind(_TEXT_OPENING)
    if not data.endswith(_TEXT_CLOSING + end):
        if start >= 0:
            raise damaged(path, "the seal at its end is not whole")
        return None
    text = data[start + len(_TEXT_OPENING) : -len(_TEXT_CLOSING + end)]
    body, _, digest = text.rpartition(b" ")
    whole = hashlib.sha256(payload(data[: max(start, 0)]))
    whole.update(body)
    if start < 0 or whole.hexdigest().encode() != digest:
        raise damaged(path, "its contents do not have the SHA-256 they were sealed with")
    metadata = json.loads(body)
    assert isinstance(metadata, dict)
    return metadata


def check_zip(path: Path, data: bytes, what: str) -> Collection[str]:
    """Return the names in a whole zip archive without its first folder; `what` is such a file.

    Raises:
        ArtifactError: it is none, or not whole.
    """
    if not data.startswith(_ZIP_START):
        raise damaged(path, f"{what} is a zip archive, and this does not begin as one")
    end = data.rfind(_ZIP_END, 0, len(data) - _ZIP_END_BYTES + len(_ZIP_END))
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            bad = archive.testzip()
            names = {name.partition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError) as error:
        raise damaged(path, f"its zip archive is not whole ({error})") from error
    (comment_length,) = struct.unpack_from("<H", data, end + _ZIP_END_BYTES - 2)
    after = end + _ZIP_END_BYTES
    if data.startswith(OPENING, after) or len(data) != after + comment_length:
        raise damaged(path, "the seal after the archive is cut off")
    if bad is not None:
        raise damaged(path, f"'{bad}' in its zip archive does not match its CRC")
    return names
