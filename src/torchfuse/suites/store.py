"""Where the files of a suite are kept, for all its machines: a folder, or any URL of fsspec's."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchfuse.comparing.cache import Folder
from torchfuse.errors import InputError, first_line

if TYPE_CHECKING:
    from torchfuse.comparing.cache import Store

__all__ = ["Url", "check_store", "is_seen", "leave_mark", "remove_mark", "store_at"]


@dataclass(frozen=True)
class Url:
    """A folder of an object store or the like; what is old there is for its owner to remove."""

    url: str

    def _place(self, name: str) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        files, path = url_to_fs(self.url.rstrip("/"))
        return files, f"{path}/{name}"

    def get(self, name: str) -> bytes | None:
        """Return what is kept under a name; None: nothing."""
        files, path = self._place(name)
        try:
            found: bytes = files.cat_file(path)
        except OSError:
            return None
        return found

    def put(self, name: str, data: bytes) -> None:
        """Keep bytes under a name.

        A file system that shows half a file gets it under another name first.

        Raises:
            OSError: there is no room, or no permission.
        """
        files, path = self._place(name)
        files.makedirs(path.rpartition("/")[0], exist_ok=True)
        part = f"{path}.{secrets.token_hex(8)}.part"
        files.pipe_file(part, data)
        files.mv(part, path)

    def remove(self, name: str) -> None:
        """Keep nothing under a name any more."""
        files, path = self._place(name)
        files.rm_file(path)

    def prune(self) -> None:
        """Leave everything: who else uses it is not known."""


def store_at(address: str) -> Store:
    """Return the store at a folder's path or a URL."""
    return Url(address) if "://" in address else Folder(Path(address))


def check_store(address: str) -> None:
    """Find out, before long work, whether something can be kept there and read again.

    Raises:
        InputError: it cannot.
    """
    remove_mark(address, leave_mark(address))


def leave_mark(address: str) -> str:
    """Leave something in the store to know it by; return its name.

    Raises:
        InputError: nothing can be kept there, or not be read again.
    """
    name = f"mark-{secrets.token_hex(8)}"
    try:
        store_at(address).put(name, name.encode())
        is_there = is_seen(address, name)
    except Exception as error:  # each file system of fsspec's has its own
        raise InputError(
            f"Nothing can be kept in the cache '{address}': {first_line(error)}; give another "
            "with --cache, a folder or a URL."
        ) from error
    if not is_there:
        raise InputError(f"What was kept in the cache '{address}' cannot be read again.")
    return name


def is_seen(address: str, mark: str) -> bool:
    """Whether a mark is there, seen from here."""
    return store_at(address).get(mark) == mark.encode()


def remove_mark(address: str, mark: str) -> None:
    """Take a mark away."""
    store_at(address).remove(mark)
