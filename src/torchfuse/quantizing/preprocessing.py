"""How a picture becomes the model's input: size, mean, standard deviation, layout."""

# No annotations from __future__: torch.jit.script reads those of `WithPreprocessing`, not as text.
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from torchfuse.errors import CalibrationError, InputError
from torchfuse.serialization import plain

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["PICTURES", "Preprocessing", "WithPreprocessing", "pictures_in"]

PICTURES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_CHANNELS = 3
_SIDES = 2
_SIXTEEN_BITS = 257  # 65535 / 255


@dataclass(frozen=True)
class Preprocessing:
    """RGB pictures resized so that they cover `size`, cropped to its middle, and normalised.

    y = (x / 255 − mean) / std        per channel, x in 0…255
    """

    size: tuple[int, int] = (224, 224)  # height, width, in pixels
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet's, on a scale of 0 to 1
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    layout: Literal["NCHW", "NHWC"] = "NCHW"  # of what the model takes

    def __post_init__(self) -> None:
        if not (isinstance(self.size, (tuple, list)) and len(self.size) == _SIDES):
            raise InputError(f"Expected a size of (height, width) in pixels, got {self.size!r}.")
        if len(self.mean) != _CHANNELS or len(self.std) != _CHANNELS:
            raise InputError(
                f"Expected a mean and a std for each of {_CHANNELS} channels, got {self.mean} and "
                f"{self.std}."
            )
        if min(self.size) < 1 or min(self.std) <= 0:
            raise InputError(
                f"Expected a positive size and std, got {self.size} pixels and {self.std}."
            )
        if not all(0 <= mean <= 1 for mean in self.mean) or max(self.std) > 1:
            raise InputError(
                f"Expected a mean and a std of pixels on a scale of 0 to 1, got {self.mean} and "
                f"{self.std}; divide those of a scale of 0 to 255 by 255."
            )
        if self.layout not in ("NCHW", "NHWC"):
            raise InputError(f"Expected the layout NCHW or NHWC, got {self.layout!r}.")

    def pixels(self, path: "Path") -> Tensor:
        """Return one picture as uint8 `[1, height, width, 3]`, resized and cropped.

        Raises:
            CalibrationError: the file is no picture that Pillow can read, or Pillow is missing.
        """
        try:
            from PIL import Image, ImageOps
        except ImportError as error:
            raise CalibrationError(
                "Reading pictures takes Pillow; install it: pip install 'torchfuse[pictures]'."
            ) from error
        try:
            with Image.open(path) as opened:
                picture = _rgb(ImageOps.exif_transpose(opened))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise CalibrationError(f"'{path}' cannot be read as a picture: {error}.") from error
        height, width = self.size
        fitted = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
        flat = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
        return flat.reshape(1, height, width, _CHANNELS)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return the model's input for uint8 pixels `[N, height, width, 3]`, in `layout`."""
        scaled = (pixels.float() / 255 - torch.tensor(self.mean)) / torch.tensor(self.std)
        return scaled if self.layout == "NHWC" else scaled.permute(0, 3, 1, 2).contiguous()

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON takes them, as they are kept in an artifact's metadata."""
        return dict(plain(self))


class WithPreprocessing(nn.Module):
    """The model behind its preprocessing: takes uint8 pixels `[N, height, width, 3]`.

    In the file it cannot be got wrong on the phone. In float it is x · a + t, an operation of its
    own; static int8 folds it into the convolutions that read it (`normalisation.py`).
    """

    factor: Tensor
    term: Tensor

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.layout = preprocessing.layout
        std = torch.tensor(preprocessing.std)
        self.register_buffer("factor", 1 / (255 * std))
        self.register_buffer("term", -torch.tensor(preprocessing.mean) / std)
        self.train(model.training)

    def forward(self, pixels: Tensor) -> Any:
        """Return what the model returns for these pixels."""
        x = pixels.float() * self.factor + self.term
        return self.model(x if self.layout == "NHWC" else x.permute(0, 3, 1, 2).contiguous())


def _rgb(picture: Any) -> Any:
    """The picture in 8-bit RGB, as a viewer shows it: what is transparent lies on white."""
    from PIL import Image

    if picture.mode.startswith("I"):  # 16 bits, which convert() would clip to 255
        return picture.convert("I").point(lambda x: x * (1 / _SIXTEEN_BITS)).convert("RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return picture.convert("RGB")


def pictures_in(folder: "Path") -> "Iterator[Path]":
    """Yield the picture files of a folder and the folders in it, by name; hidden ones are not."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and path.suffix.lower() in PICTURES and not hidden:
            yield path
