"""The normalisation can go into the file, where the phone cannot get it wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import torchfuse
from torchfuse import Preprocessing, WithPreprocessing
from torchfuse.artifacts import check


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
