"""The jobs of a suite as a worker does them: make a model's files, time them on a device.

A job and its outcome are plain data. Models are loaded where they are needed, by their source;
files go by the cache, with their checksums.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import random
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torchfuse import model_source
from torchfuse.artifacts import Artifact  # noqa: TC001  # a job holds it
from torchfuse.cases import cases
from torchfuse.comparing.cache import Cache
from torchfuse.comparing.comparison import LOCAL, Comparison
from torchfuse.comparing.variants import Work, begin
from torchfuse.errors import ArtifactError, DeviceError, InputError, TorchfuseError, first_line
from torchfuse.quantizing.preprocessing import Preprocessing, WithPreprocessing
from torchfuse.runner.allocator import keep_freed_memory
from torchfuse.suites.machine import Turn, machine_name
from torchfuse.suites.store import store_at
from torchfuse.suites.suite_file import Entry  # noqa: TC001  # likewise

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchfuse.comparing.jobs import Build, Built, Evaluated, Place

__all__ = ["Job", "MadeFiles", "Outcome", "perform"]

Tell = Callable[[str], None]

_MODELS_HELD = 2  # of the last jobs in a process, with all that was found out of them
_CHANNELS = 3
_PICTURE_DIMENSIONS = 4
_LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class MadeFiles:
    """What is known of a model, and of its files, before anything was timed. Plain."""

    base: Comparison
    digest: str | None  # of the content; None: it cannot be told
    kept_as: str  # the digest that its files are kept by
    architecture: str
    machine: str  # where it was made
    builds: tuple[Build, ...]  # files, in the rows' order
    places: tuple[Place, ...] = ()
    artifacts: dict[Place, Artifact] = field(default_factory=dict)
    evaluated: dict[Place, Evaluated] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    known: dict[str, Any] = field(default_factory=dict)  # more fields of the comparison
    is_same: bool = False  # as what was known before; then nothing else was looked at

    def joined(self, other: MadeFiles) -> MadeFiles:
        """Return this with what another share of the same model's files is."""
        return replace(
            self,
            builds=(*self.builds, *other.builds),
            places=(*self.places, *other.places),
            artifacts={**self.artifacts, **other.artifacts},
            evaluated={**self.evaluated, **other.evaluated},
            notes=tuple(dict.fromkeys((*self.notes, *other.notes))),
            known={**self.known, **other.known},
            is_same=self.is_same and other.is_same,
        )


@dataclass(frozen=True)
class Job:
    """Files to be made, or to be timed on a device."""

    run: str  # of the suite, unlike any other
    entry: Entry
    store: str  # the cache's folder or URL
    salt: str | None  # of the cache's digests, where nothing made before is to be found
    device: str | None = None  # None: the files are to be made
    part: int = 0  # of the files
    parts: int = 1
    known: str | None = None  # the digest of a comparison that needs nothing more
    made: MadeFiles | None = None  # where they are to be timed

    @property
    def what(self) -> str:
        """What it does, in words."""
        if self.device is not None:
            return f"timing on {self.device}"
        share = f", share {self.part + 1} of {self.parts}" if self.parts > 1 else ""
        return f"making its files{share}"


@dataclass(frozen=True)
class Outcome:
    """What came of a job; one of the first two is there."""

    value: MadeFiles | Comparison | None
    error: str | None  # a sentence
    may_help: str | None  # what may help: "again", or "remake": its files are gone
    machine: str
    began_s: float  # of the epoch
    ended_s: float
    waited_s: float  # of it, for others on the machine


class _GoneError(Exception):
    """A file is not in the cache any more."""


def perform(job: Job, tell: Tell, outran: Callable[[], object]) -> Outcome:
    """Do a job; what goes wrong is in the outcome.

    `tell` is given each step, `outran` called when the job takes longer than it may, waiting for
    others not counted: whoever is called then has to end the process.
    """
    began_s = time.time()
    turn = Turn()
    value: MadeFiles | Comparison | None = None
    error: str | None = None
    may_help: str | None = None
    try:
        with _watched(job.entry.time_limit_s, turn, outran):
            value = _make(job, turn, tell) if job.made is None else _measure(job, turn, tell)
    except _GoneError as gone:
        error, may_help = str(gone), "remake"
    except (ArtifactError, DeviceError) as found:  # a disk or a device may be ready next time
        error, may_help = str(found), "again"
    except TorchfuseError as found:  # the model, the data or the file is not as expected
        error = str(found)
    except OSError as found:
        error, may_help = f"{type(found).__name__}: {first_line(found)}", "again"
    except Exception as found:  # noqa: BLE001  # a user's model may raise anything; the others go on
        error = f"{type(found).__name__}: {first_line(found)}"
    return Outcome(value, error, may_help, machine_name(), began_s, time.time(), turn.waited_s())


@contextlib.contextmanager
def _watched(limit_s: float, turn: Turn, outran: Callable[[], object]) -> Iterator[None]:
    ended = threading.Event()
    began_s = time.monotonic()

    def watch() -> None:
        while not ended.wait(min(_LOOK_EVERY_S, limit_s)):
            if time.monotonic() - began_s - turn.waited_s() > limit_s:
                outran()
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# ── making ───────────────────────────────────────────────────────────────────────────────────────


def _make(job: Job, turn: Turn, tell: Tell) -> MadeFiles:
    def step(text: str) -> None:
        turn.let_others()
        tell(text)

    with turn.beside(), tempfile.TemporaryDirectory() as temporary:
        work = _begun(job, Path(temporary), step)
        if job.known is not None and job.known == work.base.digest:
            return replace(_made(work), is_same=True)
        work.build(job.part, job.parts)
        if job.part == 0:
            work.draw()
        work.explain()
        work.evaluate()
        return _made(work)


def _made(work: Work) -> MadeFiles:
    assert work.cache is not None
    builds = [job for job in work.jobs() if job.place in work.artifacts]
    return MadeFiles(
        base=work.base,
        digest=work.digest,
        kept_as=work.cache.digest,
        architecture=platform.machine(),
        machine=machine_name(),
        builds=tuple(builds),
        places=tuple(work.places),
        artifacts=dict(work.artifacts),
        evaluated=dict(work.evaluated),
        notes=tuple(dict.fromkeys(work.notes)),
        known=dict(work.known),
    )


class _SharedCache(Cache):
    """The cache by which files get to other machines: what cannot be kept there is an error."""

    def built(self, job: Build, make: Callable[[Build], Built]) -> Built:
        found = self.find(job)
        if found is None:
            found = make(job)
            try:
                self.keep(job, found)
            except OSError as error:
                raise ArtifactError(
                    f"A file cannot be kept in the cache: {first_line(error)}; free some space "
                    "there, or give another with --cache."
                ) from error
        return found


_HELD: OrderedDict[tuple[str, Entry], Work] = OrderedDict()


def _begun(job: Job, folder: Path, step: Tell) -> Work:
    """Return the work on a model, of which nothing is done; held from a job before, or anew."""
    entry = replace(job.entry, name="", devices=(), time_limit_s=0.0)
    key = (job.run, entry)
    if key not in _HELD:
        while len(_HELD) >= _MODELS_HELD:
            _HELD.popitem(last=False)
        step("loading")
        _HELD[key] = _loaded(job, folder, step)
    _HELD.move_to_end(key)
    held = _HELD[key]
    return replace(
        held, folder=folder, progress=step, places=[], artifacts={}, notes=[], measured={},
        timed={}, evaluated={}, known={}, unfinished=None,
    )  # fmt: skip


def _loaded(job: Job, folder: Path, step: Tell) -> Work:
    entry = job.entry
    _forget_modules(_folders_of(entry))
    # Weights that a model draws are the same in every process: it is loaded in several.
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # the one that a model may use without asking
    model, example, preprocessing = _with_preprocessing(entry)
    function = None if entry.evaluate is None else model_source.load_function(entry.evaluate)

    def cache(digest: str) -> Cache:
        salted = digest if job.salt is None else _digest(digest, job.salt)
        return _SharedCache(store_at(job.store), salted)

    work = begin(
        model,
        example,
        folder=folder,
        variants=entry.variants,
        targets=entry.targets,
        data=entry.path,
        validation=entry.validation,
        preprocessing=preprocessing,
        evaluate=function,
        threads=entry.threads,
        runs=entry.runs,
        cache=cache,
        progress=step,
    )
    if work.cache is None:  # its content cannot be told: what is made is for this run only
        unlike_any = _digest(job.run, entry.name)
        work = replace(work, cache=_SharedCache(store_at(job.store), unlike_any))
    return work


def _folders_of(entry: Entry) -> set[Path]:
    sources = [text for text in (entry.source, entry.evaluate) if text is not None]
    paths = [model_source.parse_source(text).path for text in sources]
    return {path.resolve().parent for path in paths if path is not None}


_FOLDERS: set[Path] = set()  # of the source files of all models of this process


def _forget_modules(folders: set[Path]) -> None:
    """Have what models' files import beside them imported anew: two may use one name for it."""
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if path is not None and Path(path).parent in _FOLDERS:
            del sys.modules[name]
    _FOLDERS.update(folders)


def _with_preprocessing(entry: Entry) -> tuple[Any, Any, Preprocessing | None]:
    """Return the model, its example and how pictures become inputs."""
    inputs: tuple[str, ...] = ()
    if entry.size is not None:
        sizes = (_CHANNELS, *entry.size) if entry.layout == "NCHW" else (*entry.size, _CHANNELS)
        inputs = ("x".join(map(str, (1, *sizes))),)
    weights = None if entry.weights is None else Path(entry.weights)
    loaded = model_source.load(entry.source, entry.inputs, weights, inputs)
    if entry.mean is None or entry.std is None:
        return loaded.model, loaded.example_inputs, None
    shape = tuple(getattr(_first(loaded.example_inputs), "shape", ()))
    shown = None
    if len(shape) == _PICTURE_DIMENSIONS:
        height, width = shape[2:] if entry.layout == "NCHW" else shape[1:3]
        shown = int(height), int(width)
    size = entry.size or shown
    if size is None:
        raise InputError("Expected a size, since the example input is no picture to take it from.")
    if shown not in (None, size):
        raise InputError(
            f"Expected the size of the example input, {shown}, got {size}; give the same in both."
        )
    preprocessing = Preprocessing(size, entry.mean, entry.std, entry.layout)
    if not entry.preprocess_inside:
        return loaded.model, loaded.example_inputs, preprocessing
    pixels = torch.randint(0, 256, (1, *size, _CHANNELS), dtype=torch.uint8)
    return WithPreprocessing(loaded.model, preprocessing), pixels, preprocessing


def _first(example: Any) -> Any:
    case = cases(example)[0]
    return next(iter((*case.args, *case.kwargs.values())), None)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


# ── measuring ────────────────────────────────────────────────────────────────────────────────────


def _measure(job: Job, turn: Turn, tell: Tell) -> Comparison:
    """Return the comparison on one device.

    The model is loaded and its files are fetched beside others' builds; the times are taken alone.
    """
    made, device = job.made, job.device
    assert made is not None
    assert device is not None

    def step(text: str) -> None:
        turn.let_others()
        tell(text)

    keep_freed_memory()  # some of the rows are measured in this process
    with tempfile.TemporaryDirectory() as temporary:
        with turn.beside():
            work = _begun(job, Path(temporary), step)
            _require_same(work, made)
            step("fetching its files")
            _fetch(work, made)
        work = replace(work, progress=tell)
        with turn.alone() if device == LOCAL else turn.on_device(device):
            work.measure(device)
    failed = work.measured[device].error if device in work.measured else None
    if failed is not None:
        raise DeviceError(failed)
    found = work.so_far()
    if found is None:
        raise InputError("There is no file to run there; name a target with files.")
    return found


def _require_same(work: Work, made: MadeFiles) -> None:
    """Find out whether the model that was loaded here is the one that the files were made of.

    Other processors round otherwise, so that fused weights may differ there.

    Raises:
        InputError: it is another.
    """
    if made.digest is None or made.architecture != platform.machine():
        return
    if work.digest != made.digest:
        raise InputError(
            f"The model is another on {machine_name()} than on {made.machine}, where its files "
            "were made: other code, data, weights or versions, or weights drawn without a seed; "
            "make these the same on all machines."
        )


def _fetch(work: Work, made: MadeFiles) -> None:
    """Put the files where they are measured, and take over all else that is known.

    Raises:
        _GoneError: one is not in the cache any more, or is another one.
    """
    assert work.cache is not None
    cache = replace(work.cache, digest=made.kept_as)
    moved: dict[Place, Place] = {}
    for job in made.builds:
        assert job.place.path is not None
        place = replace(job.place, path=work.folder / job.place.path.name)
        found = cache.find(replace(job, place=place))
        expected = made.artifacts[job.place]
        if found is None or found.artifact is None or found.artifact.sha256 != expected.sha256:
            raise _GoneError(f"'{place.path}' is not in the cache any more")
        moved[job.place] = place
        work.artifacts[place] = found.artifact
    work.places += [moved.get(place, place) for place in made.places]
    work.evaluated.update({moved.get(p, p): found for p, found in made.evaluated.items()})
    work.notes += made.notes
    work.known.update(made.known)
