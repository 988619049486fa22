"""What was made before of the same content: a second comparison measures anew and exports nothing.

The content is the model's tensors, what it does on its example and the source of its classes, the
variants', the example, the calibration data, and the versions of all that makes files.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import platform
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchfuse.artifacts import Artifact, write_all_atomically, write_atomically
from torchfuse.comparing.jobs import Build, Built
from torchfuse.delegation import Delegation  # noqa: TC001  # msgspec reads annotations
from torchfuse.errors import ArtifactError, InputError, TorchfuseError
from torchfuse.graph.recording import record
from torchfuse.serialization import from_json, to_json
from torchfuse.targets import TARGETS
from torchfuse.verifying.equivalence import Equivalence  # noqa: TC001  # likewise

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torchfuse.cases import Case
    from torchfuse.comparing.jobs import ComparedModel

__all__ = ["Cache", "Folder", "Store", "default_folder", "digest_of", "makers"]

_T = TypeVar("_T")
_FORM = "torchfuse-cache-2"
_MOST_BYTES = 4_000_000_000  # beyond which the oldest entries go
_MAKERS = ("torchfuse", "torchao", *sorted({target.distribution for target in TARGETS}))
_PLAIN = (bool, int, float, str, type(None))


def default_folder() -> Path:
    """Return where the command line keeps what it made."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "torchfuse"


@dataclass(frozen=True)
class _File:
    """An artifact, but for where it lies and what is kept beside."""

    format: str
    precision: str
    size_bytes: int
    sha256: str
    notes: tuple[str, ...]
    batch_norms: int | None
    batch_norms_left: int | None
    verified_on: str | None
    computes_in: str | None
    beside: tuple[str, ...]  # suffixes of its other files

    @classmethod
    def of(cls, made: Artifact) -> _File:
        named = {entry.name: getattr(made, entry.name) for entry in fields(cls)}
        return cls(**{**named, "beside": tuple(path.suffix for path in made.beside)})

    def artifact(
        self, path: Path, delegation: Delegation | None, equivalence: Equivalence | None
    ) -> Artifact:
        plain: dict[str, Any] = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        plain["beside"] = tuple(path.with_suffix(suffix) for suffix in self.beside)
        return Artifact(path=path, delegation=delegation, equivalence=equivalence, **plain)


@dataclass(frozen=True)
class _Kept:
    """What is kept of a build, as JSON."""

    file: _File | None
    delegation: Delegation | None
    equivalence: Equivalence | None
    notes: tuple[str, ...]
    left_out: str | None

    @classmethod
    def of(cls, built: Built) -> _Kept:
        made = built.artifact
        if made is None:
            return cls(None, None, None, built.notes, built.left_out)
        return cls(_File.of(made), made.delegation, made.equivalence, built.notes, None)


class Store(Protocol):
    """Where bytes are kept by name."""

    def get(self, name: str) -> bytes | None:
        """Return what is kept under a name; None: nothing."""

    def put(self, name: str, data: bytes) -> None:
        """Keep bytes under a name, all of them or none.

        Raises:
            OSError, ArtifactError: there is no room, or no permission.
        """

    def remove(self, name: str) -> None:
        """Keep nothing under a name any more."""

    def prune(self) -> None:
        """Let go of what was kept longest ago, where there is too much."""


@dataclass(frozen=True)
class Folder:
    """A folder, which is made when something is kept in it."""

    path: Path

    def get(self, name: str) -> bytes | None:
        """Return what is kept under a name; None: nothing."""
        try:
            return (self.path / name).read_bytes()
        except OSError:
            return None

    def put(self, name: str, data: bytes) -> None:
        """Keep bytes under a name.

        Raises:
            OSError, ArtifactError: there is no room, or no permission.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / name, data)

    def remove(self, name: str) -> None:
        """Keep nothing under a name any more."""
        (self.path / name).unlink(missing_ok=True)

    def prune(self) -> None:
        """Let go of the oldest files, where there are too many bytes."""
        entries = []
        for path in self.path.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process prunes too
                entries.append((path.stat().st_mtime, path.stat().st_size, path))
        total = 0
        for _, size_bytes, path in sorted(entries, reverse=True):
            total += size_bytes
            if total > _MOST_BYTES:
                path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Cache:
    """Files and results of one content."""

    store: Store
    digest: str  # of the content: `digest_of`

    def built(self, job: Build, make: Callable[[Build], Built]) -> Built:
        """Return the file of a job, made before or made now."""
        found = self.find(job)
        if found is None:
            found = make(job)
            with contextlib.suppress(OSError, ArtifactError):  # a full disk fails nothing
                self.keep(job, found)
        return found

    def find(self, job: Build) -> Built | None:
        """Return the file of a job, put where it is wanted; None: it was not made before."""
        place = job.place
        assert place.path is not None
        key = self._key_of(job)
        kept = self._read(key, _Kept)
        if kept is None:
            return None
        if kept.file is None:
            return Built(None, kept.notes, kept.left_out, 0.0)
        artifact = kept.file.artifact(place.path, kept.delegation, kept.equivalence)
        if not self._copied(key, artifact):
            return None
        return Built(artifact, kept.notes, None, 0.0)

    def keep(self, job: Build, built: Built) -> None:
        """Keep what a job made.

        Raises:
            OSError, ArtifactError: there is no room, or no permission.
        """
        key = self._key_of(job)
        if built.artifact is not None:
            for path in (built.artifact.path, *built.artifact.beside):
                self.store.put(key + path.suffix, path.read_bytes())
        self._write(key, _Kept.of(built))
        self.store.prune()

    def result(self, name: str, kind: type[_T], make: Callable[[], _T]) -> _T:
        """Return a result of that name, found before or found now."""
        key = self._key("result", name)
        found = self._read(key, kind)
        if found is not None:
            return found
        made = make()
        with contextlib.suppress(OSError, ArtifactError):
            self._write(key, made)
        return made

    def _copied(self, key: str, artifact: Artifact) -> bool:
        """Put kept files where they are wanted; False: they are not there, or not what they were.

        Of an artifact of several files the first holds the checksums of the others.
        """
        files: dict[str | os.PathLike[str], bytes] = {}
        for path in (artifact.path, *artifact.beside):
            data = self.store.get(key + path.suffix)
            if data is None:
                return False
            files[path] = data
        if hashlib.sha256(files[artifact.path]).hexdigest() != artifact.sha256:
            return False
        if sum(map(len, files.values())) != artifact.size_bytes:
            return False
        write_all_atomically(files)
        return True

    def _key_of(self, job: Build) -> str:
        return self._key("build", *map(str, (job.place, job.optimize)))

    def _key(self, *parts: str) -> str:
        return hashlib.sha256("\0".join((self.digest, *parts)).encode()).hexdigest()[:40]

    def _read(self, key: str, kind: type[_T]) -> _T | None:
        data = self.store.get(f"{key}.json")
        if data is None:
            return None
        try:
            return from_json(kind, data, _FORM)
        except (InputError, UnicodeDecodeError):
            return None

    def _write(self, key: str, value: Any) -> None:
        self.store.put(f"{key}.json", to_json(value, _FORM).encode())


def digest_of(subject: ComparedModel) -> str | None:
    """Return what tells one content from another; None: the model cannot be recorded."""
    digest = hashlib.sha256()

    def take(*values: object) -> None:
        for value in values:
            digest.update(f"{value}\0".encode())

    take(
        platform.machine(),
        platform.python_version(),
        *(f"{name} {found}" for name, found in makers().items()),
    )
    take(subject.preprocessing)
    try:
        for name, module in {"": subject.model, **subject.variants}.items():
            take(name)
            _take_model(module, subject.examples[0], digest.update, take)
    except TorchfuseError:
        return None
    calibration = subject.calibration
    if calibration is not None:
        take(calibration.source, calibration.random)  # which the files say
    for cases in (subject.examples, () if calibration is None else calibration.cases):
        for case in cases:
            take(case, case.method)
            for leaf in pytree.tree_leaves((case.args, dict(case.kwargs))):
                _take_value(leaf, digest.update, take)
    return digest.hexdigest()


def makers() -> dict[str, str | None]:
    """Return the versions of all that makes files, by distribution; None: it is not installed."""
    found: dict[str, str | None] = {}
    for name in _MAKERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _take_model(
    model: nn.Module, case: Case, raw: Callable[[bytes], object], take: Callable[..., None]
) -> None:
    take(model)  # its modules' names, classes and settings
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        take(name)
        _take_value(tensor, raw, take)
    files = {_file_of(type(module)) for module in model.modules()} - {None}
    for path in sorted(map(str, files)):
        raw(Path(path).read_bytes())
    for call in record(model, [case]).calls:
        take(call.target, call.module_path, *sorted(call.operands))
        take(*sorted(_plain(call.attributes).items()))


def _file_of(class_: type) -> str | None:
    """Return the file that a class of the user's stands in; None for torch's: it has a version."""
    if class_.__module__.partition(".")[0] == "torch":
        return None
    try:
        return inspect.getsourcefile(class_)
    except TypeError:  # it was made in a session
        return None


def _plain(attributes: Mapping[str, Any]) -> dict[str, str]:
    """Return what can be told from an attribute without its address in memory."""
    leaves = {name: pytree.tree_leaves(value) for name, value in attributes.items()}
    return {
        name: repr([leaf if isinstance(leaf, _PLAIN) else type(leaf).__name__ for leaf in found])
        for name, found in leaves.items()
    }


def _take_value(value: Any, raw: Callable[[bytes], object], take: Callable[..., None]) -> None:
    if not isinstance(value, torch.Tensor):
        take(value if isinstance(value, _PLAIN) else type(value).__name__)
        return
    take(value.dtype, tuple(value.shape))
    if value.layout is torch.strided and not value.is_meta and not value.is_quantized:
        plain = value.detach().cpu().contiguous().reshape(-1)
        raw(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    else:
        take(value)
