"""Labelled samples: what answers and accuracy are measured on, and what int8 is calibrated on."""

import csv
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchfuse.cases import Case
from torchfuse.errors import CalibrationError
from torchfuse.quantizing.calibration import (
    CalibrationData,
    checked_calibration,
    read_calibration,
    tensors_of,
)
from torchfuse.quantizing.preprocessing import Preprocessing, pictures_in

__all__ = ["Samples", "all_of", "batch_size", "calibration_cases", "held_out", "read_samples"]

_LISTS = (".csv", ".txt")
_LABELS = ("labels", "label", "targets", "y")  # names of the array of labels in an .npz
_FEWEST_TO_SPLIT = 8
_HELD_OUT = 4  # every fourth sample
_COLUMNS = 2


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples one by one, read when they are asked for; labels are the classes' numbers."""

    read: tuple[Callable[[], Case], ...]  # one sample each
    names: tuple[str, ...]
    labels: tuple[int, ...] | None
    source: str  # in words
    classes: int | None = None  # how many names labels are numbered by; None: they are numbers
    random: bool = False

    def __len__(self) -> int:
        return len(self.read)

    def part(self, indices: Sequence[int], source: str) -> "Samples":
        """Return those of these indices."""
        return replace(
            self,
            read=tuple(self.read[i] for i in indices),
            names=tuple(self.names[i] for i in indices),
            labels=None if self.labels is None else tuple(self.labels[i] for i in indices),
            source=source,
        )

    def batches(self, example: Case) -> Iterable[Case]:
        """Yield them in batches as large as the example's; a last one that is not full is not."""
        size = batch_size(example)
        for start in range(0, len(self.read) - size + 1, size):
            yield _joined([read() for read in self.read[start : start + size]])


def batch_size(example: Case) -> int:
    """Return the first size that all tensors of a call have; 1 if they differ."""
    sizes = {int(tensor.shape[0]) if tensor.dim() else 1 for tensor in tensors_of(example)}
    return sizes.pop() if len(sizes) == 1 else 1


def held_out(samples: Samples) -> tuple[Samples, Samples]:
    """Return what to calibrate on, and what to validate on, which is every fourth sample.

    Of fewer than eight samples none can be spared: both are then all of them.
    """
    count = len(samples)
    if count < _FEWEST_TO_SPLIT:
        only = "the sample" if count == 1 else f"the {count} samples"
        return samples, replace(samples, source=f"{only} that int8 is calibrated on")
    kept = [i for i in range(count) if i % _HELD_OUT != _HELD_OUT - 1]
    out = [i for i in range(count) if i % _HELD_OUT == _HELD_OUT - 1]
    return (
        samples.part(kept, samples.source),
        samples.part(out, f"{len(out)} of the {count} samples of {samples.source}, held out"),
    )


def read_samples(
    data: Any,
    example: Case,
    preprocessing: Preprocessing | None = None,
    *,
    as_pixels: bool = False,
    names: Sequence[str] = (),
) -> Samples:
    """Return data as samples, with their labels where it has any.

    `data` is what `quantize` takes as calibration data (a DataLoader may give a label with each
    sample), or a file: an `.npz` with an array "labels" beside the arguments; a folder of pictures,
    in folders by class or with a `labels.csv` in it; a `.csv` or `.txt` that gives a picture and
    its label in each line. Classes that are no numbers are numbered in the order of their names.

    Raises:
        CalibrationError: the data is missing, empty, unreadable or does not fit the example.
    """
    if isinstance(data, str | os.PathLike) and str(data) != "random":
        path = Path(data)
        if path.suffix in _LISTS:
            return _listed(path, preprocessing, as_pixels)
        if path.is_dir():
            lists = [path / f"labels{suffix}" for suffix in _LISTS]
            for listed in lists:
                if listed.is_file():
                    return _listed(listed, preprocessing, as_pixels)
            return _folder(path, example, preprocessing, as_pixels)
        if path.suffix == ".npz" and path.is_file():
            data, labels = _without_labels(path, example, names)
            if labels is not None:
                found = read_calibration(data, example, preprocessing, names=names)
                return _of_cases(found.cases, labels, f"'{path.name}'")
            data = path
    found = read_calibration(data, example, preprocessing, as_pixels=as_pixels, names=names)
    labels = None if found.labels is None else [int(label) for label in found.labels]
    return replace(_of_cases(found.cases, labels, found.source), random=found.random)


def _of_cases(cases: Sequence[Case], labels: Sequence[int] | None, source: str) -> Samples:
    singles = [single for case in cases for single in _singles(case)]
    if labels is not None and len(labels) != len(singles):
        raise CalibrationError(
            f"Expected a label for each of the {len(singles)} samples of {source}, got "
            f"{len(labels)}."
        )
    return Samples(
        tuple(functools.partial(_given, case) for case in singles),
        tuple(f"sample {i}" for i in range(len(singles))),
        None if labels is None else tuple(labels),
        source,
    )


def _given(case: Case) -> Case:
    return case


def _singles(case: Case) -> list[Case]:
    """Return a batch as its samples."""
    leaves, spec = pytree.tree_flatten((case.args, dict(case.kwargs)))
    sizes = {len(leaf) if leaf.dim() else 0 for leaf in leaves if isinstance(leaf, torch.Tensor)}
    if len(sizes) != 1 or (count := sizes.pop()) <= 1:
        return [case]
    parts = []
    for i in range(count):
        args, kwargs = pytree.tree_unflatten(
            [x[i : i + 1] if isinstance(x, torch.Tensor) else x for x in leaves], spec
        )
        parts.append(Case(args, kwargs))
    return parts


def _joined(cases: Sequence[Case]) -> Case:
    """Return samples as one batch."""
    if len(cases) == 1:
        return cases[0]
    flat = [pytree.tree_flatten((case.args, dict(case.kwargs))) for case in cases]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    joined = [torch.cat(c) if isinstance(c[0], torch.Tensor) else c[0] for c in columns]
    args, kwargs = pytree.tree_unflatten(joined, flat[0][1])
    return Case(args, kwargs)


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────


def _pictures(
    paths: Sequence[Path],
    labels: Sequence[str] | None,
    names: Sequence[str],
    source: str,
    preprocessing: Preprocessing | None,
    as_pixels: bool,
) -> Samples:
    if preprocessing is None:
        raise CalibrationError(
            f"{source} are pictures, so it must be said how a picture becomes the model's input: "
            "give --mean and --std, or preprocessing=Preprocessing(size=…, mean=…, std=…)."
        )

    def reader(path: Path) -> Callable[[], Case]:
        def read() -> Case:
            pixels = preprocessing.pixels(path)
            return Case((pixels if as_pixels else preprocessing.normalised(pixels),))

        return read

    numbers, classes = (None, None) if labels is None else _numbered(labels)
    return Samples(tuple(map(reader, paths)), tuple(names), numbers, source, classes)


def _numbered(labels: Sequence[str]) -> tuple[tuple[int, ...], int | None]:
    """Return labels as numbers, and how many names were numbered; None: they were numbers."""
    if all(label.isdecimal() for label in labels):
        return tuple(map(int, labels)), None
    known = {name: number for number, name in enumerate(sorted(set(labels)))}
    return tuple(known[label] for label in labels), len(known)


def _folder(
    folder: Path, example: Case, preprocessing: Preprocessing | None, as_pixels: bool
) -> Samples:
    paths = list(pictures_in(folder))
    if not paths:  # says which suffixes are known
        read_calibration(folder, example, preprocessing, as_pixels=as_pixels)
    names = [path.relative_to(folder).as_posix() for path in paths]
    classes = [name.partition("/")[0] for name in names]
    by_class = all("/" in name for name in names) and len(set(classes)) > 1
    source = f"the pictures in '{folder.name}'"
    return _pictures(paths, classes if by_class else None, names, source, preprocessing, as_pixels)


def _listed(path: Path, preprocessing: Preprocessing | None, as_pixels: bool) -> Samples:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"'{path}' cannot be read as text: {error}.") from error
    rows = (
        [row for row in csv.reader(text.splitlines()) if row]
        if path.suffix == ".csv"
        else [line.rsplit(None, 1) for line in text.splitlines() if line.strip()]
    )
    for number, row in enumerate(rows, 1):
        if len(row) != _COLUMNS:
            raise CalibrationError(
                f"Expected a picture and its label in every line of '{path}', got "
                f"{len(row)} value{'' if len(row) == 1 else 's'} in line {number}."
            )
    if rows and path.suffix == ".csv" and not (path.parent / rows[0][0]).is_file():
        rows = rows[1:]  # the headings
    if not rows:
        raise CalibrationError(f"'{path}' names no pictures; give one and its label in each line.")
    for name, _ in rows:
        if not (path.parent / name).is_file():
            raise CalibrationError(f"'{path}' names the picture '{name}', which is not there.")
    return _pictures(
        [path.parent / name for name, _ in rows],
        [label.strip() for _, label in rows],
        [name for name, _ in rows],
        f"the pictures that '{path.name}' lists",
        preprocessing,
        as_pixels,
    )


# ── arrays ───────────────────────────────────────────────────────────────────────────────────────


def _without_labels(
    path: Path, example: Case, names: Sequence[str]
) -> tuple[Any, list[int] | None]:
    """Return the arguments in an .npz as `read_calibration` takes them, and the labels in it."""
    import numpy as np

    try:
        arrays = dict(np.load(path, allow_pickle=False))
    except Exception:  # noqa: BLE001  # read_calibration says what is wrong with it
        return path, None
    name = next((n for n in _LABELS if n in arrays and n not in (*names, *example.kwargs)), None)
    if name is None:
        return path, None
    labels = arrays.pop(name)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise CalibrationError(
            f"Expected an integer per sample as '{name}' in '{path}', got "
            f"{'×'.join(map(str, labels.shape)) or 'one'} of {labels.dtype}."
        )
    numbers = [int(label) for label in labels]
    if example.kwargs:
        return arrays, numbers
    if len(example.args) == len(arrays) == 1:
        return next(iter(arrays.values())), numbers
    wanted = list(names[: len(example.args)])
    if set(wanted) != set(arrays):
        raise CalibrationError(
            f"'{path}' holds {', '.join(arrays)} beside '{name}'; expected the model's arguments "
            f"{', '.join(wanted)}."
        )
    return tuple(arrays[argument] for argument in wanted), numbers


def all_of(samples: Samples, example: Case) -> CalibrationData:
    """Return all samples, in batches as large as the example's, with their labels.

    Raises:
        CalibrationError: they are unfit, or fewer than a batch.
    """
    size = batch_size(example)
    used = len(samples) // size * size
    if not used:
        raise CalibrationError(
            f"Expected at least {size} samples to calibrate on, as many as the example's batch, "
            f"got {len(samples)} of {samples.source}."
        )
    labels = None if samples.labels is None else torch.tensor(samples.labels[:used])
    cases = checked_calibration(list(samples.batches(example)), example)
    return CalibrationData(cases, samples.source, samples.random, labels)


def calibration_cases(samples: Samples, example: Case, most: int) -> list[Case]:
    """Return at most so many samples, spread over them all, in batches as large as the example's.

    Raises:
        CalibrationError: they are unfit.
    """
    size = batch_size(example)
    step = -(-len(samples) // max(1, most // size) // size)
    every = samples.part(
        [i for start in range(0, len(samples) - size + 1, step * size)
         for i in range(start, start + size)],
        samples.source,
    )  # fmt: skip
    if not len(every):
        raise CalibrationError(
            f"Expected at least {size} samples to calibrate on, as many as the example's batch, "
            f"got {len(samples)} of {samples.source}."
        )
    return checked_calibration(list(every.batches(example)), example)
