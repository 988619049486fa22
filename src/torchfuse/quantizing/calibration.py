"""Calibration data: read from where it is, checked, run through a model with observers in it."""

import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchfuse.cases import Case, cases
from torchfuse.errors import CalibrationError, first_line
from torchfuse.isolation.snapshot import put_back
from torchfuse.quantizing.preprocessing import PICTURES, Preprocessing, pictures_in
from torchfuse.verifying.outputs import copy_tensors

__all__ = [
    "CALIBRATED",
    "SETTLED",
    "CalibrationData",
    "calibrate",
    "checked_calibration",
    "elements",
    "late_growth",
    "read_calibration",
    "sample_count",
    "tensors_of",
]

CALIBRATED = "torchfuse_calibrated"  # in a quantized graph's meta: on what data, in words
SETTLED = "torchfuse_settled"  # likewise: whether its ranges had
RANDOM = "random"  # calibration on noise, for a look at speed; asked for by name only
_RANDOM_SAMPLES = 16
_ARRAYS = (".npy", ".npz")
# A picture in uint8 or a mask in bool is no number in another integer type.
_OF_THEIR_OWN = {torch.uint8, torch.bool}


@dataclass(frozen=True)
class CalibrationData:
    """Checked cases, and where they came from in words."""

    cases: list[Case]
    source: str
    random: bool = False
    labels: torch.Tensor | None = None  # [samples], where a DataLoader came with them


def read_calibration(
    calibration: Any,
    example: Case,
    preprocessing: Preprocessing | None = None,
    *,
    as_pixels: bool = False,
    names: Sequence[str] = (),
) -> CalibrationData:
    """Return the calibration data as checked cases.

    `calibration` is a tensor or array, a tuple or a dict of arguments, a `Case`, any iterable of
    these (a DataLoader; one integer per sample after the arguments is taken for its label), an
    `.npy` or `.npz` file with samples along the first axis (in an `.npz`, one array per argument,
    by name), a folder of pictures, for which `preprocessing` says how they become inputs, or
    "random". With `as_pixels` pictures are left as uint8 `[1, height, width, 3]`, for a model that
    normalises them itself. `names` are those of forward's arguments. What was read before is
    returned as it is.

    Raises:
        CalibrationError: the data is missing, empty, constant, unreadable, of another dtype than
            the example, or holds NaN or Inf.
    """
    if isinstance(calibration, CalibrationData):
        return calibration
    if isinstance(calibration, str) and calibration == RANDOM:
        return CalibrationData(_random_like(example), f"{_RANDOM_SAMPLES} random inputs", True)
    if isinstance(calibration, (str, os.PathLike)):
        path = Path(calibration)
        if path.is_dir():
            pictures = _pictures(path, preprocessing, as_pixels=as_pixels)
            return CalibrationData(
                checked_calibration(pictures, example), f"the pictures in '{path.name}'"
            )
        if path.suffix in _ARRAYS:
            arrays = _arrays(path, example, names)
            return CalibrationData(checked_calibration(arrays, example), f"'{path.name}'")
        raise CalibrationError(
            f"Expected calibration data in an .npy or .npz file or a folder of pictures, got "
            f"'{path}', which is {'no such file' if not path.exists() else 'neither'}."
        )
    entries, labels = _entries(calibration, example)
    data = checked_calibration(entries, example)
    source = "1 given case" if len(data) == 1 else f"{len(data)} given cases"
    return CalibrationData(data, source, labels=labels)


def _random_like(example: Case) -> list[Case]:
    from torchfuse.fusing.proving import other_inputs

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
    if not pixels:
        raise CalibrationError(
            f"Expected a folder of pictures, got '{folder}', which holds none "
            f"({', '.join(sorted(PICTURES))})."
        )
    return pixels if as_pixels else [preprocessing.normalised(picture) for picture in pixels]


def _entries(calibration: Any, example: Case) -> tuple[Any, torch.Tensor | None]:
    """What `cases` takes, arrays as tensors and a DataLoader's lists as tuples; and the labels."""
    if calibration is None:
        return None, None
    one = (torch.Tensor, tuple, Mapping, Case)
    if isinstance(calibration, one) or _is_array(calibration):
        return _as_tensors(calibration, example), None
    if not isinstance(calibration, Iterable):
        return calibration, None  # `cases` says what is wrong with it
    entries, labels = [], []
    for entry in calibration:
        arguments, label = _without_label(entry, example)
        entries.append(_as_tensors(arguments, example))
        labels.append(label)
    given = [label for label in labels if label is not None]
    if given and len(given) < len(labels):
        raise CalibrationError(
            f"Expected a label with every calibration case or with none, got {len(given)} labels "
            f"for {len(labels)} cases."
        )
    return entries, torch.cat(given) if given else None


def _without_label(entry: Any, example: Case) -> tuple[Any, torch.Tensor | None]:
    """The arguments of `(*arguments, label)`, one integer per sample, and the label."""
    if not isinstance(entry, (list, tuple)) or example.kwargs:
        return entry, None
    arguments = tuple(entry)
    if len(arguments) != len(example.args) + 1:
        return arguments, None
    *rest, label = arguments
    label = torch.as_tensor(label) if isinstance(label, int) or _is_array(label) else label
    fits = isinstance(label, torch.Tensor) and not label.is_floating_point() and label.dim() <= 1
    return (tuple(rest), label.flatten()) if fits else (arguments, None)


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and not isinstance(value, torch.Tensor)


def _as_tensors(entry: Any, example: Case) -> Any:
    """The entry with its NumPy arrays as tensors, in the dtypes of the example's."""
    if _is_array(entry):
        like = example.args[0] if example.args else next(iter(example.kwargs.values()), None)
        return _tensor(entry, like, "The calibration data")
    if isinstance(entry, tuple) and any(map(_is_array, entry)):
        likes = [*example.args, *[None] * len(entry)]
        return tuple(
            _tensor(value, like, "The calibration data") if _is_array(value) else value
            for value, like in zip(entry, likes, strict=False)
        )
    if isinstance(entry, Mapping) and any(map(_is_array, entry.values())):
        return {
            name: _tensor(value, example.kwargs.get(name), "The calibration data")
            if _is_array(value)
            else value
            for name, value in entry.items()
        }
    return entry


def _tensor(array: Any, like: Any, what: str) -> torch.Tensor:
    """The array as a tensor, in the example's precision; whole numbers do not become others."""
    import numpy as np

    values = np.asarray(array)
    try:
        tensor = torch.from_numpy(np.array(values, values.dtype.newbyteorder("=")))
    except TypeError as error:
        raise CalibrationError(f"{what} holds {values.dtype} values, expected numbers.") from error
    if isinstance(like, torch.Tensor) and like.is_floating_point() == tensor.is_floating_point():
        return tensor if {like.dtype, tensor.dtype} & _OF_THEIR_OWN else tensor.to(like.dtype)
    return tensor


def _arrays(path: Path, example: Case, names: Sequence[str]) -> list[Case]:
    """One case per sample, with arguments in the dtype of the example's."""
    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
        named = dict(loaded) if path.suffix == ".npz" else {"": loaded}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CalibrationError(
            f"'{path}' cannot be read as NumPy data without pickles: {first_line(error)}."
        ) from error
    if not named or any(array.ndim == 0 for array in named.values()):
        raise CalibrationError(f"'{path}' must hold arrays with samples along their first axis.")
    if len({len(array) for array in named.values()}) != 1:
        lengths = ", ".join(f"{len(array)} in {name}" for name, array in named.items())
        raise CalibrationError(f"'{path}' must hold as many samples in every array, got {lengths}.")
    positional = len(example.args) > len(example.kwargs)
    expected = list(names[: len(example.args)]) if positional else list(example.kwargs)
    if set(named) == set(expected):  # by name, in whatever order they were saved
        named = {name: named[name] for name in expected}
    elif not positional:
        raise CalibrationError(
            f"'{path}' holds {', '.join(named)}; expected the model's arguments "
            f"{', '.join(expected)}."
        )
    elif len(named) != len(example.args):
        raise CalibrationError(
            f"'{path}' holds {len(named)} arrays ({', '.join(named)}); the model takes "
            f"{len(example.args)}: {', '.join(expected) or 'by position'}."
        )
    elif len(named) > 1:
        raise CalibrationError(
            f"'{path}' holds {', '.join(named)}; expected the names of the model's arguments, "
            f"{', '.join(expected)}, so that none is taken for another."
        )
    given = list(example.args) if positional else [example.kwargs[name] for name in named]
    columns = [
        _tensor(array, like, f"'{path}'") for array, like in zip(named.values(), given, strict=True)
    ]
    samples = range(len(columns[0]))
    if positional:
        return [Case(tuple(column[i : i + 1] for column in columns)) for i in samples]
    return [
        Case((), {name: column[i : i + 1] for name, column in zip(named, columns, strict=True)})
        for i in samples
    ]


def checked_calibration(calibration: Any, example: Case | None = None) -> list[Case]:
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
    data = cases(calibration, "calibration")
    lowest: dict[int, float] = {}
    highest: dict[int, float] = {}
    for number, case in enumerate(data):
        if example is not None:
            _require_dtypes(case, example, number)
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


def _require_dtypes(case: Case, example: Case, number: int) -> None:
    given, expected = tensors_of(case), tensors_of(example)
    if len(given) != len(expected):
        return  # running the case says what is wrong with it
    for ours, theirs in zip(given, expected, strict=True):
        if ours.dtype is not theirs.dtype:
            raise CalibrationError(
                f"Calibration case {number}, {case}, holds {_name(ours)}, the example inputs "
                f"{_name(theirs)}; convert it as the model's inputs are."
            )


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


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
