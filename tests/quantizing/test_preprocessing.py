"""The normalisation can go into the file, where the phone cannot get it wrong."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import torchfuse
from torchfuse import Preprocessing, WithPreprocessing
from torchfuse.errors import CalibrationError, InputError
from torchfuse.targets.opening import check


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(torch.relu(self.conv(x)), 1).flatten(1))


EIGHT = Preprocessing(size=(8, 8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


def test_pixels_in_are_the_same_as_normalised_pictures_in(folder: Path) -> None:
    model = Net().eval()
    pixels = EIGHT.pixels(folder / "3.png")
    assert pixels.dtype is torch.uint8
    expected = model(EIGHT.normalised(pixels))
    assert torch.allclose(WithPreprocessing(model, EIGHT)(pixels), expected, atol=1e-6)


def test_a_model_with_other_axes_gets_them() -> None:
    seen = []

    class Looking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.shape)
            return x

    last = Preprocessing(size=(8, 8), layout="NHWC")
    WithPreprocessing(Looking(), last)(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
    assert seen == [(1, 8, 8, 3)]


# Pixels become floats outside the delegate, which in so small a model is a share that matters.
@pytest.mark.filterwarnings("ignore::torchfuse.DelegationWarning")
@pytest.mark.parametrize("quantized", [False, True])
def test_a_file_takes_pixels_and_normalises_them_itself(folder: Path, quantized: bool) -> None:
    model = Net().eval()
    whole = WithPreprocessing(model, EIGHT)
    pixels = EIGHT.pixels(folder / "3.png")
    given = whole
    if quantized:
        given = torchfuse.quantize(whole, pixels, folder, preprocessing=EIGHT).model
    artifact = torchfuse.export(given, pixels, folder / "model.pte", preprocessing=EIGHT.to_dict())
    got = torchfuse.load(artifact.path)(pixels)
    expected = model(EIGHT.normalised(pixels))
    noise = (expected - got).square().sum() / expected.square().sum()
    assert noise < (1e-3 if quantized else 1e-9)


def test_the_settings_are_kept_in_the_file(folder: Path) -> None:
    model = Net().eval()
    x = EIGHT.normalised(EIGHT.pixels(folder / "0.png"))
    artifact = torchfuse.export(model, x, folder / "model.pte", preprocessing=EIGHT.to_dict())
    kept = check(artifact.path).metadata["preprocessing"]
    assert kept["size"] == [8, 8]
    assert kept["mean"] == list(EIGHT.mean)
    assert kept["layout"] == "NCHW"
    loaded = torchfuse.load(artifact.path)
    assert loaded.preprocessing == kept
    assert "takes 1×3×8×8 float32; made by {'layout': 'NCHW'" in repr(loaded)
    with pytest.raises(InputError, match=r"got 1×8×8×3 float32\. Its input is made by .*'mean'"):
        loaded(torch.zeros(1, 8, 8, 3))


def saved(folder: Path, pixels: np.ndarray) -> Tensor:
    Image.fromarray(pixels).save(folder / "one.png")
    return EIGHT.pixels(folder / "one.png")


def test_pictures_of_other_kinds_are_seen_as_a_viewer_shows_them(tmp_path: Path) -> None:
    grey = saved(tmp_path, np.full((8, 8), 100, np.uint8))
    assert grey.unique().tolist() == [100]
    transparent = saved(tmp_path, np.zeros((8, 8, 4), np.uint8))
    assert transparent.unique().tolist() == [255]
    sixteen_bits = saved(tmp_path, np.full((8, 8), 100 * 257, np.uint16))
    assert sixteen_bits.unique().tolist() == [100]


def test_a_picture_that_was_taken_sideways_is_turned(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    Image.fromarray(pixels).save(tmp_path / "one.png", exif=exif)
    seen = EIGHT.pixels(tmp_path / "one.png")
    assert seen[0, :, 4:].unique().tolist() == [255]
    assert seen[0, :, :4].unique().tolist() == [0]


def test_without_pillow_it_is_said_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(CalibrationError, match=r"takes Pillow; .* 'torchfuse\[pictures\]'"):
        Preprocessing((8, 8)).pixels(folder / "0.png")


def test_pictures_of_other_sizes_are_cut_to_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert EIGHT.pixels(tmp_path / "wide.png").unique().tolist() == [255]
