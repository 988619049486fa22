"""Calibration data: read from where it is, checked, run through a model with observers in it."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchfuse.checking import copy_tensors
from torchfuse.errors import CalibrationError, first_line
from torchfuse.inputs import Case, cases
from torchfuse.quantizing.preprocessing import Preprocessing, pictures_in
from torchfuse.restoring import put_back

__all__ = [
    "CalibrationData",
    "calibrate",
    "checked_calibration",
    "elements",
    "late_growth",
    "read_calibration",
    "sample_count",
    "tensors_of",
]

RANDOM = "random"  # calibration on noise, for a look at speed; asked for by name only
_RANDOM_SAMPLES = 16
_ARRAYS = (".npy", ".npz")


@dataclass(frozen=True)
class CalibrationData:
    """Checked cases, and where they came from in words."""

    cases: list[Case]
    source: str
    random: bool = False


def read_calibration(
    calibration: Any,
    example: Case,
    preprocessing: Preprocessing | None = None,
    *,
    as_pixels: bool = False,
) -> CalibrationData:
    """Return the calibration data as checked cases.

    `calibration` is a tensor, a tuple or a dict of arguments, a `Case`, any iterable of these (a
    DataLoader that yields inputs without labels), an `.npy` or `.npz` file with samples along
    the first axis (in an `.npz`, one array per argument, by name), a folder of pictures, for which
    `preprocessing` says how they become inputs, or "random". With `as_pixels` pictures are left
    as uint8 `[1, height, width, 3]`, for a model that normalises them itself.

    Raises:
        CalibrationError: the data is missing, empty, constant, unreadable, or holds NaN or Inf.
    """
    if isinstance(calibration, str) and calibration == RANDOM:
        return CalibrationData(_random_like(example), f"{_RANDOM_SAMPLES} random inputs", True)
    if isinstance(calibration, (str, os.PathLike)):
        path = Path(calibration)
        if path.is_dir():
            return CalibrationData(
                checked_calibration(_pictures(path, preprocessing, as_pixels=as_pixels)),
                f"the pictures in '{path.name}'",
            )
        if path.suffix in _ARRAYS:
            return CalibrationData(checked_calibration(_arrays(path, example)), f"'{path.name}'")
        raise CalibrationError(
            f"Expected calibration data in an .npy or .npz file or a folder of pictures, got "
            f"'{path}', which is {'no such file' if not path.exists() else 'neither'}."
        )
    data = checked_calibration(calibration)
    return CalibrationData(data, "1 given case" if len(data) == 1 else f"{len(data)} given cases")


def _random_like(example: Case) -> list[Case]:
    from torchfuse.proving import other_inputs

    return [other_inputs(example, seed) for seed in range(_RANDOM_SAMPLES)]


def _pictures(
    folder: Path, preprocessing: Preprocessing | None, *, as_pixels: bool
) -> list[torch.Tensor]:
    if preprocessing is None:
        raise CalibrationError(
            f"'{folder}' is a folder of pictures, so it must be said how a picture becomes the "
            "model's input: give preprocessing=Preprocessing(size=…, mean=…, std=…)."
        )
    pixels = [preprocessing.pixels(path) for path in pictures_in(folder)]
    return pixels if as_pixels else [preprocessing.normalised(picture) for picture in pixels]


def _arrays(path: Path, example: Case) -> list[Case]:
    """One case per sample, with arguments in the dtype of the example's."""
    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
        named = dict(loaded) if path.suffix == ".npz" else {"": loaded}
    except (OSError, ValueError, EOFError) as error:
        raise CalibrationError(f"'{path}' cannot be read as NumPy data: {error}.") from error
    positional = len(example.args) > len(example.kwargs)
    expected = [*map(str, range(len(example.args)))] if positional else list(example.kwargs)
    arrays = {name: torch.from_numpy(array) for name, array in named.items()}
    if not arrays or len({len(array) for array in arrays.values()}) != 1:
        raise CalibrationError(f"'{path}' must hold arrays with the same number of samples.")
    if not positional and set(arrays) != set(expected):
        raise CalibrationError(
            f"'{path}' holds {', '.join(arrays)}; expected the model's arguments "
            f"{', '.join(expected)}."
        )
    if positional and len(arrays) != len(expected):
        raise CalibrationError(
            f"'{path}' holds {len(arrays)} arrays; the model takes {len(expected)} arguments."
        )
    given = list(example.args) if positional else [example.kwargs[name] for name in arrays]
    columns = [
        array.to(like.dtype) if isinstance(like, torch.Tensor) else array
        for array, like in zip(arrays.values(), given, strict=True)
    ]
    samples = range(len(columns[0]))
    if positional:
        return [Case(tuple(column[i : i + 1] for column in columns)) for i in samples]
    return [
        Case((), {name: column[i : i + 1] for name, column in zip(arrays, columns, strict=True)})
        for i in samples
    ]


def checked_calibration(calibration: Any) -> list[Case]:
    """Return the calibration data as cases, or raise CalibrationError if it is unfit."""
    if calibration is None:
        raise CalibrationError(
            "Expected calibration data, got None: static int8 needs the ranges of the activations, "
            "so give some dozens of inputs as the model will see them."
        )
    if isinstance(calibration, Iterable) and not isinstance(
        calibration, torch.Tensor | tuple | Mapping | list
    ):
        calibration = list(calibration)
    if isinstance(calibration, list) and not calibration:
        raise CalibrationError("The calibration data is empty; give at least one input.")
    data = cases(calibration)
    lowest: dict[int, float] = {}
    highest: dict[int, float] = {}
    for number, case in enumerate(data):
        for position, tensor in enumerate(tensors_of(case)):
            if not tensor.numel():
                raise CalibrationError(
                    f"Calibration case {number}, {case}, has a tensor without elements."
                )
            if not tensor.isfinite().all():
                raise CalibrationError(
                    f"Calibration case {number}, {case}, holds NaN or Inf; leave such inputs out."
                )
            low, high = (float(extreme) for extreme in tensor.aminmax())
            lowest[position] = min(low, lowest.get(position, low))
            highest[position] = max(high, highest.get(position, high))
    if lowest == highest:
        raise CalibrationError(
            f"The calibration data is constant (every value is {lowest.get(0, 'missing')}), so it "
            "says nothing about the ranges of the activations; give real inputs."
        )
    return data


def calibrate(
    prepared: nn.Module, data: list[Case], *, buffers: Mapping[str, torch.Tensor] | None = None
) -> float | None:
    """Run a model with observers in it on the calibration data; return how late ranges grew.

    Every case is run on copies, with the `buffers` of the model itself (by name) as they are given.
    What is returned is the largest relative growth of a range in the last tenth of the cases; None
    for fewer than ten.

    Raises:
        CalibrationError: the model cannot run on a case, or returns NaN or Inf.
    """
    early: dict[str, float] = {}
    for number, case in enumerate(data):
        if number == len(data) - len(data) // 10:
            early = _widths(prepared)
        try:
            args, kwargs = copy_tensors((case.args, dict(case.kwargs)))  # `forward` may write to it
            with torch.no_grad():
                outputs = prepared(*args, **kwargs)
                put_back(prepared, buffers or {})
        except Exception as error:
            raise CalibrationError(
                f"The model cannot run on calibration case {number}, {case}: {first_line(error)}."
            ) from error
        for output in pytree.tree_leaves(outputs):
            if isinstance(output, torch.Tensor) and not output.isfinite().all():
                raise CalibrationError(
                    f"The model returns NaN or Inf for calibration case {number}, {case}."
                )
    return late_growth(early, _widths(prepared))


def _widths(prepared: nn.Module) -> dict[str, float]:
    """How wide the range of each activation is so far, by its observer's name."""
    found = {}
    for name, module in prepared.named_modules():
        low, high = getattr(module, "min_val", None), getattr(module, "max_val", None)
        if isinstance(low, torch.Tensor) and isinstance(high, torch.Tensor) and low.numel() == 1:
            found[name] = float(high) - float(low)
    return found


def late_growth(early: Mapping[str, float], late: Mapping[str, float]) -> float | None:
    """The largest relative growth from one to the other; None if there is nothing to compare.

    >>> late_growth({"a": 2.0, "b": 1.0}, {"a": 2.5, "b": 1.0})
    0.25
    """
    growths = [late[name] / early[name] - 1 for name in early if early[name] > 0]
    return max(growths, default=None)


def tensors_of(case: Case) -> list[torch.Tensor]:
    """The tensors among a case's arguments."""
    leaves = pytree.tree_leaves((case.args, dict(case.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def elements(case: Case) -> int:
    """How many numbers a case holds."""
    return sum(tensor.numel() for tensor in tensors_of(case))


def sample_count(data: list[Case]) -> int:
    """How many samples the cases hold: the batch sizes, summed; a scalar is one."""
    return sum(
        int(tensors[0].shape[0]) if tensors and tensors[0].dim() else 1
        for tensors in map(tensors_of, data)
    )
