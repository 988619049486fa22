"""--data and how its pictures become inputs, the same for every command that calibrates."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchfuse.errors import CalibrationError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchfuse.quantizing.calibration import CalibrationData
    from torchfuse.quantizing.preprocessing import Preprocessing

__all__ = ["DataOptions", "data_options"]

_CHANNELS = 3
_PICTURE_DIMENSIONS = 4
_RANDOM = "random"
_LISTS = (".csv", ".txt")  # of pictures and their labels


def data_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, which is given them together as `given`."""

    @functools.wraps(function)
    def command(**options: Any) -> Any:
        named = {field.name: options.pop(field.name) for field in fields(DataOptions)}
        return function(given=DataOptions(**named), **options)

    wrapped: Callable[..., Any] = command
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


_OPTIONS = (
    click.option(
        "--data", metavar="PATH",
        help="Real inputs, to calibrate on and to compare on: .npy, .npz, a folder of pictures, or "
        "'random' for a look at speed.",
    ),
    click.option(
        "--size", metavar="HxW",
        help="Pictures: size in pixels, such as 224x224. Default: the example's.",
    ),
    click.option("--mean", metavar="R,G,B", help="Pictures: mean on a scale of 0 to 1."),
    click.option("--std", metavar="R,G,B", help="Pictures: standard deviation on that scale."),
    click.option(
        "--layout", type=click.Choice(["NCHW", "NHWC"]), default="NCHW", show_default=True,
        help="Pictures: axes of what the model takes.",
    ),
    click.option(
        "--preprocess-inside", is_flag=True,
        help="Put the normalisation into the file, which then takes uint8 pixels, N×H×W×3.",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class DataOptions:
    """What was given of the options."""

    data: str | None
    size: str | None
    mean: str | None
    std: str | None
    layout: str
    preprocess_inside: bool

    def check(self) -> None:
        """Find out, before there is a model, whether they fit together and the data is there.

        Raises:
            CalibrationError: there is no such data, or it is not said what pictures mean.
            InputError: an option that cannot be read, or one without the other that it needs.
        """
        if self.size is not None:
            _parsed_size(self.size)
        is_normalised = self.mean is not None and self.std is not None
        if not is_normalised and not (self.size is self.mean is self.std is None):
            raise InputError("Expected --mean and --std together: each changes the input.")
        if self.mean is not None and self.std is not None:
            _numbers("--mean", self.mean)
            _numbers("--std", self.std)
        if self.preprocess_inside and not is_normalised:
            raise InputError("--preprocess-inside needs --mean and --std.")
        if self.data is None or self.data == _RANDOM:
            return
        self.check_data("--data", self.data)

    def check_data(self, option: str, given: str) -> None:
        """Find out whether an option's data is there, and whether it is said what pictures mean.

        Raises:
            CalibrationError: it is not.
        """
        path = Path(given)
        if not path.exists():
            raise CalibrationError(
                f"Expected {option} as an .npy or .npz file, a folder of pictures, or "
                f"'{_RANDOM}', got '{path}', which is no such file."
            )
        if (path.is_dir() or path.suffix in _LISTS) and (self.mean is None or self.std is None):
            what = "is a folder of" if path.is_dir() else "lists"
            raise CalibrationError(
                f"'{path}' {what} pictures, so it must be said how a picture becomes the "
                "model's input: give --mean and --std, and --size unless it is the example's."
            )

    def preprocessing(self, example: Any) -> Preprocessing | None:
        """Return how pictures become inputs; None if nothing was said of it.

        Raises:
            InputError: the example is no picture to take the size from, or a figure is impossible.
        """
        if self.mean is None or self.std is None:
            return None
        from torchfuse.quantizing.preprocessing import Preprocessing

        size = _size_of(example, self.layout) if self.size is None else _parsed_size(self.size)
        return Preprocessing(
            size=size,
            mean=_numbers("--mean", self.mean),
            std=_numbers("--std", self.std),
            layout="NCHW" if self.layout == "NCHW" else "NHWC",
        )

    def inputs(self) -> tuple[str, ...]:
        """Return --input as --size says it for a picture; nothing where that is not said."""
        if self.size is None or self.mean is None:
            return ()
        height, width = _parsed_size(self.size)
        sizes = (_CHANNELS, height, width) if self.layout == "NCHW" else (height, width, _CHANNELS)
        return ("x".join(map(str, (1, *sizes))),)

    def kept(self, preprocessing: Preprocessing | None) -> dict[str, Any] | None:
        """Return what the file's metadata says to whoever makes its input."""
        if preprocessing is None:
            return None
        plain = preprocessing.to_dict()
        if not self.preprocess_inside:
            return plain
        # The file normalises: whoever did it as well would do it twice.
        return {"size": plain["size"], "layout": "NHWC", "dtype": "uint8"}

    def applied(self, model: Any, example: Any) -> tuple[Any, Any, Preprocessing | None]:
        """Return the model and its example as they are to be exported, and the preprocessing.

        With --preprocess-inside these are the model with its normalisation, and pixels.
        """
        preprocessing = self.preprocessing(example)
        if preprocessing is not None and self.size is not None:
            self._require_size(preprocessing, example)
        if not self.preprocess_inside or preprocessing is None:
            return model, example, preprocessing
        import torch

        from torchfuse.quantizing.preprocessing import WithPreprocessing

        pixels = torch.randint(0, 256, (1, *preprocessing.size, _CHANNELS), dtype=torch.uint8)
        return WithPreprocessing(model, preprocessing), pixels, preprocessing

    def read(
        self, model: Any, example: Any, preprocessing: Preprocessing | None
    ) -> CalibrationData | None:
        """Return the data as checked cases for a model as `applied` returned it; None: none given.

        Raises:
            CalibrationError: it is unfit.
        """
        if self.data is None:
            return None
        from torchfuse.cases import cases
        from torchfuse.quantizing import read_calibration
        from torchfuse.quantizing.static import argument_names

        return read_calibration(
            self.data,
            cases(example)[0],
            preprocessing,
            as_pixels=self.preprocess_inside,
            names=argument_names(model),
        )

    def _require_size(self, preprocessing: Preprocessing, example: Any) -> None:
        shape = _picture(example)
        if len(shape) != _PICTURE_DIMENSIONS:
            return
        given = tuple(shape[2:] if self.layout == "NCHW" else shape[1:3])
        if given != tuple(preprocessing.size):
            wanted, got = ("x".join(map(str, size)) for size in (given, preprocessing.size))
            raise InputError(
                f"Expected --size {wanted}, the size of the example input, got {got}; give the "
                "same size in both."
            )


def _parsed_size(text: str) -> tuple[int, int]:
    height, separator, width = text.partition("x")
    if not (separator and height.isdigit() and width.isdigit()):
        raise InputError(f"Expected --size as HxW, such as 224x224, got '{text}'.")
    return int(height), int(width)


def _size_of(example: Any, layout: str) -> tuple[int, int]:
    """The height and width of the example's picture."""
    shape = _picture(example)
    if len(shape) != _PICTURE_DIMENSIONS:
        raise InputError("Expected --size, since the example input is no picture to take it from.")
    height, width = shape[2:] if layout == "NCHW" else shape[1:3]
    return height, width


def _picture(example: Any) -> tuple[int, ...]:
    """The shape of the example's first argument."""
    from torchfuse.cases import cases

    case = cases(example)[0]
    (picture, *_) = (*case.args, *case.kwargs.values(), None)
    return tuple(getattr(picture, "shape", ()))


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != _CHANNELS:
        raise InputError(
            f"Expected {option} as three numbers such as 0.485,0.456,0.406, got '{text}'."
        )
    return numbers
