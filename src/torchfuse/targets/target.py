"""What a target is: a format, the runtime that runs it, and what this package asks of both."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchfuse.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import nn

    from torchfuse.artifacts import Precision
    from torchfuse.cases import Case
    from torchfuse.delegation import Delegation
    from torchfuse.operator_times import Profile

__all__ = ["CheckedFile", "Files", "Made", "Request", "Target"]

Files = Mapping[str, bytes]  # the files of an artifact by suffix: {".xml": …, ".bin": …}


@dataclass(frozen=True)
class Request:
    """What is to become a file. Its options were checked, and the model ran on its examples."""

    model: "nn.Module"
    examples: "Sequence[Case]"
    form: str  # the suffix without its dot
    precision: "Precision | None" = None  # None: as the model is
    calibration: "list[Case] | None" = None  # for int8
    dynamic_shapes: Any = None  # as torch.export takes them
    optimize: bool = True  # False: what is not fused stays so


@dataclass(frozen=True)
class Made:
    """A model in a target's form, before it is written."""

    files: Files  # without a seal
    precision: "Precision"
    metadata: Mapping[str, Any]  # what loading it needs
    run: Callable[..., Any]
    reference: "nn.Module"  # the model given, or the quantized one made of it
    delegation: "Delegation | None" = None
    other_cases: "tuple[Case, ...]" = ()  # at other sizes
    notes: tuple[str, ...] = ()  # what was done otherwise than asked: what comes after "it was"
    known: tuple[str, ...] = ()  # notes that the user was warned of when the model was quantized
    computes_in: str | None = None  # what the runtime says, of what is not int8; None: it does not
    batch_norms: int | None = None  # in the model's graph; None: not counted
    batch_norms_left: int | None = None  # in the file's


@dataclass(frozen=True)
class CheckedFile:
    """The bytes of a file that passed its checks; what is loaded must be these, not the path."""

    path: Path
    format: str  # the suffix without its dot
    data: bytes
    metadata: Mapping[str, Any] | None  # None: not sealed by torchfuse
    beside: Files = field(default_factory=dict)  # the bytes of its other files, by suffix

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return len(self.data) + sum(map(len, self.beside.values()))


class Target(ABC):
    """A format by its suffix, and the runtime that runs it.

    What is a class's own is light to import: a runtime is imported by the method that needs it.
    """

    name: str  # as its makers write it
    suffix: str
    beside: tuple[str, ...] = ()  # suffixes of other files that an artifact has beside the first
    extra: str | None = None  # pip install 'torchfuse[…]'; None: torchfuse itself needs it
    modules: tuple[str, ...] = ()  # that must be importable to make and run it
    distribution: str  # whose version is the runtime's
    precisions: "tuple[Precision, ...]"  # that it can be exported in
    folds: tuple[str, ...]  # what the runtime merges by itself, whatever was done before
    takes_any_size: bool = False  # inputs of all sizes, without being told which
    takes_dynamic_shapes: bool = True
    native_runner: str | None = None  # the binary that runs it on devices, by its makers' name
    quantized_by: str | None = None  # whose quantized models it takes: "pt2e" or "torch.ao"
    for_phones: bool = False  # compared with others unasked
    most_compact_only: bool = False  # compared only in the last precision that there is
    always_fused: str | None = None  # why no file of it is not fused; None: there are such files

    @property
    def form(self) -> str:
        """The suffix without its dot, as metadata and reports have it."""
        return self.suffix.removeprefix(".")

    @property
    def version(self) -> str | None:
        """The installed runtime's version; None: it is not installed."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return None

    def other_version(self, metadata: Mapping[str, Any] | None) -> str | None:
        """Say that a file was made with another version of the runtime than is here; None: no."""
        made_by, here = (metadata or {}).get(self.distribution), self.version
        if made_by is None or here is None or made_by.split("+")[0] == here.split("+")[0]:
            return None
        return f"it was made with {self.distribution} {made_by}, and this is {here}"

    @property
    def install(self) -> str:
        """The line that installs what this target needs."""
        return f"pip install 'torchfuse{'' if self.extra is None else f'[{self.extra}]'}'"

    def is_installed(self) -> bool:
        """Whether the modules that it needs are there; none of them is imported."""
        return not self.missing()

    def obstacle(self) -> str | None:
        """Why no file can be made here, and what to do about it; None: it can."""
        if self.is_installed():
            return None
        return (
            f"'{self.suffix}' needs {', '.join(self.missing())}, not installed here: {self.install}"
        )

    def require(self) -> None:
        """Raise UnsupportedError if no file can be made here."""
        if (obstacle := self.obstacle()) is not None:
            raise UnsupportedError(f"{obstacle}.")

    def missing(self) -> list[str]:
        """Return the modules that are not installed here, of those that it needs."""
        return [name for name in self.modules if importlib.util.find_spec(name) is None]

    def require_runtime(self) -> None:
        """Raise UnsupportedError if no file can be run here."""
        if not self.is_installed():
            self.require()

    @abstractmethod
    def make(self, request: Request) -> Made:
        """Return the model as this target's files, loaded and ready to be compared.

        Raises:
            InputError: the model, its inputs and what is asked for do not fit together.
            UnsupportedError: the target cannot do it.
        """

    @abstractmethod
    def seal(self, files: Files, metadata: Mapping[str, Any]) -> Files:
        """Return the files with the metadata and a checksum over all of them.

        The runtime's own loader takes them as it took those without.
        """

    @abstractmethod
    def unseal(self, path: Path, files: Files) -> Mapping[str, Any] | None:
        """Return the metadata of sealed files; None: torchfuse did not write them.

        Raises:
            ArtifactError: they are sealed, and not what they were.
        """

    @abstractmethod
    def check(self, path: Path, files: Files) -> None:
        """Look at the headers and sizes of files that have no seal.

        Raises:
            ArtifactError: they are not whole, or of another kind.
        """

    @abstractmethod
    def first_load(self, path: Path) -> None:
        """Load a file without a seal for the first time; in a child, which may be ended by it."""

    def preload(self) -> None:  # noqa: B027  # most runtimes are imported in no time
        """Import the runtime, but start no threads: a process that has some cannot be forked."""

    @abstractmethod
    def load(self, file: CheckedFile, *, threads: int | None = None) -> Callable[..., Any]:
        """Return the model in a file that was checked, ready to be called.

        Raises:
            ArtifactError: the runtime refuses it.
        """

    def operators(self, path: Path) -> Sequence[str]:  # noqa: ARG002  # who has none needs no path
        """Return the operators that the file needs kernels for, where the runtime may lack some."""
        return ()

    def profile(  # noqa: B027  # torch's profiler sees what torch runs
        self, file: CheckedFile, case: "Case", *, name: str, warmup: int, runs: int, threads: int
    ) -> "Profile | None":
        """Return where the time of a run goes; None: torch's profiler says it."""

    def profile_obstacle(self) -> str | None:
        """Why it cannot be said here where the time of a run goes; None: it can."""
        return f"{self.name} is not asked for a profile here"
