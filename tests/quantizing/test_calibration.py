"""Calibration data is read from wherever it is, or refused in one sentence."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from torchfuse.cases import Case
from torchfuse.errors import CalibrationError, InputError, QuantizationWarning
from torchfuse.quantizing import quantize
from torchfuse.quantizing.calibration import read_calibration
from torchfuse.quantizing.preprocessing import Preprocessing

X = torch.zeros(1, 3, 6, 6)
SIX = Preprocessing(size=(6, 6), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "some; pictures"
    folder.mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_an_npy_file_holds_samples_along_its_first_axis(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).normal(size=(5, 3, 6, 6))
    np.save(tmp_path / "data.npy", samples)
    data = read_calibration(tmp_path / "data.npy", Case((X,)))
    assert [case.args[0].shape for case in data.cases] == [(1, 3, 6, 6)] * 5
    assert data.cases[0].args[0].dtype is torch.float32  # as the example
    assert data.source == "'data.npy'"


def test_an_npz_file_holds_one_array_for_each_argument_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.ones((2, 3)), mask=np.array([[True], [False]]))
    example = Case((), {"mask": torch.ones(1, 1, dtype=torch.bool), "x": torch.ones(1, 3)})
    first, second = read_calibration(str(tmp_path / "data.npz"), example).cases
    assert first.kwargs["mask"].tolist() == [[True]]
    assert second.kwargs["mask"].tolist() == [[False]]
    assert second.kwargs["x"].dtype is torch.float32


def test_a_data_loader_of_inputs_is_read_through() -> None:
    samples = torch.randn(10, 3, 6, 6)
    data = read_calibration(DataLoader(samples, batch_size=4), Case((X,)))
    assert [len(case.args[0]) for case in data.cases] == [4, 4, 2]


def test_a_data_loader_with_labels_gives_them_too() -> None:
    samples = list(zip(torch.randn(10, 3, 6, 6), range(10), strict=True))
    data = read_calibration(DataLoader(samples, batch_size=4), Case((X,)))
    assert [len(case.args[0]) for case in data.cases] == [4, 4, 2]
    assert data.labels.tolist() == list(range(10))


def test_the_labels_of_a_data_loader_are_measured_by() -> None:
    model = nn.Sequential(Net(), nn.Flatten()).eval()
    loader = DataLoader(list(zip(torch.randn(10, 3, 6, 6), range(10), strict=True)))
    assert quantize(model, X, loader).report.accuracy[0].measure == "top-1"


def test_a_second_argument_is_no_label() -> None:
    loader = DataLoader(list(zip(torch.randn(4, 3, 6, 6), range(4), strict=True)))
    data = read_calibration(loader, Case((X, torch.zeros(1, dtype=torch.int64))))
    assert data.labels is None
    assert len(data.cases[0].args) == 2


def test_labels_with_some_of_the_cases_only_are_an_error() -> None:
    with pytest.raises(CalibrationError, match=r"with every .* got 1 labels for 2 cases"):
        read_calibration([(X, 3), (X,)], Case((X,)))


def test_arrays_are_taken_as_tensors_in_the_examples_precision() -> None:
    samples = np.random.default_rng(0).normal(size=(5, 3, 6, 6))
    for given in (samples, [samples[:2], samples[2:]], [(samples,)], samples.astype(">f4")):
        data = read_calibration(given, Case((X,)))
        assert sum(len(case.args[0]) for case in data.cases) == 5
        assert data.cases[0].args[0].dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_another_dtype_than_the_examples_is_an_error(dtype: torch.dtype) -> None:
    given = (torch.rand(2, 3, 6, 6) * 255).to(dtype)
    with pytest.raises(CalibrationError, match=r"case 0, .* holds .*, the example inputs float32"):
        read_calibration(given, Case((X,)))


def test_pixels_in_an_npy_file_do_not_become_floats_unseen(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.arange(108, dtype=np.uint8).reshape(1, 3, 6, 6))
    with pytest.raises(CalibrationError, match="holds uint8, the example inputs float32"):
        read_calibration(tmp_path / "data.npy", Case((X,)))


def test_positional_arguments_are_found_by_name_in_an_npz_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", mask=np.ones((2, 1)), x=np.random.randn(2, 3))
    example = Case((torch.ones(1, 3), torch.ones(1, 1)))
    first, _ = read_calibration(tmp_path / "data.npz", example, names=("x", "mask")).cases
    assert [tuple(value.shape) for value in first.args] == [(1, 3), (1, 1)]
    with pytest.raises(CalibrationError, match=r"holds mask, x; expected the names .* a, b"):
        read_calibration(tmp_path / "data.npz", example, names=("a", "b"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.float32(3)}, "must hold arrays with samples along their first axis"),
        ({"x": np.ones((2, 3)), "y": np.ones((3, 3))}, "as many samples in every array, got 2 in"),
        (
            {"x": np.ones((2, 3)), "y": np.ones((2, 3))},
            r"holds 2 arrays \(x, y\); the model takes 1",
        ),
        ({"x": np.array(["a", "b"])}, "holds <U1 values, expected numbers"),
    ],
)
def test_an_npz_file_that_does_not_fit_is_an_error(
    arrays: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(CalibrationError, match=message):
        read_calibration(tmp_path / "data.npz", Case((X,)))


def test_hidden_files_are_no_pictures(pictures: Path) -> None:
    (pictures / "._00.png").write_bytes(b"what some systems leave beside a picture")
    assert len(read_calibration(pictures, Case((X,)), SIX).cases) == 12


def test_a_folder_of_pictures_is_normalised_as_said(pictures: Path) -> None:
    data = read_calibration(pictures, Case((X,)), SIX)
    assert len(data.cases) == 12
    (first,) = data.cases[0].args
    pixels = SIX.pixels(pictures / "00.png").float()
    assert first.shape == (1, 3, 6, 6)
    assert torch.allclose(first, (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25)


def test_quantize_takes_the_folder(pictures: Path) -> None:
    report = quantize(Net().eval(), X, pictures, preprocessing=SIX).report
    assert report.calibrated.samples == 12
    assert report.calibrated.source == "the pictures in 'some; pictures'"
    assert report.calibrated.settled is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.npy", "cannot be read as NumPy data"),
        (lambda folder: folder / "none", "got '.*none', which is no such file"),
        (lambda folder: folder, "is a folder of pictures, so it must be said how"),
    ],
)
def test_unreadable_data_is_an_error(make: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_calibration(make(tmp_path), Case((X,)))


def test_a_pickle_in_an_npy_file_is_not_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(CalibrationError, match="cannot be read as NumPy data"):
        read_calibration(tmp_path / "objects.npy", Case((X,)))


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"got .*, which holds none"):
        read_calibration(tmp_path, Case((X,)), SIX)


def test_a_file_that_only_claims_to_be_a_picture_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(CalibrationError, match=r"broken\.png' cannot be read as a picture"):
        read_calibration(tmp_path, Case((X,)), SIX)


def test_random_calibration_is_asked_for_by_name_and_stays_in_the_report() -> None:
    with pytest.warns(QuantizationWarning, match="Calibrated on random inputs"):
        result = quantize(Net().eval(), torch.randn(1, 3, 6, 6), "random")
    assert "Calibrated on random inputs" in result.report.notes[0]
    assert result.report.calibrated.source == "16 random inputs"


def test_whether_the_ranges_had_settled_is_measured() -> None:
    steady = [torch.rand(1, 3, 6, 6) for _ in range(20)]
    steady[0] = torch.ones(1, 3, 6, 6) * 5
    steady[1] = -steady[0]
    calibrated = quantize(Net().eval(), X, steady).report.calibrated
    assert calibrated.settled
    late = [*steady, 40 * torch.rand(1, 3, 6, 6)]
    calibrated = quantize(Net().eval(), X, late).report.calibrated
    assert not calibrated.settled
    assert calibrated.widest_late_growth > 1
    few = quantize(Net().eval(), X, steady[:5]).report.calibrated
    assert few.settled is None


def test_preprocessing_that_cannot_be_is_an_error() -> None:
    with pytest.raises(InputError, match="a mean and a std for each of 3 channels"):
        Preprocessing(mean=(0.5,))
    with pytest.raises(InputError, match="a positive size and std"):
        Preprocessing(std=(0.0, 1.0, 1.0))
    with pytest.raises(InputError, match=r"a size of \(height, width\) in pixels, got 224"):
        Preprocessing(size=224)
    with pytest.raises(InputError, match="divide those of a scale of 0 to 255 by 255"):
        Preprocessing(mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))
    with pytest.raises(InputError, match="layout NCHW or NHWC"):
        Preprocessing(layout="HWC")
