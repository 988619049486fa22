"""Samples with labels: each source is read, and what does not fit is one sentence."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from torchfuse.cases import Case
from torchfuse.comparing.samples import Samples, calibration_cases, held_out, read_samples
from torchfuse.errors import CalibrationError
from torchfuse.quantizing.preprocessing import Preprocessing

EXAMPLE = Case((torch.zeros(1, 3, 4, 4),))
PREPROCESSING = Preprocessing((4, 4), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def picture(path: Path, brightness: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (brightness, 0, 0)).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, name in enumerate(("cat/a.png", "cat/b.png", "dog/a.png")):
        picture(tmp_path / "photos" / name, 51 * number)
    return tmp_path / "photos"


def brightness(samples: Samples) -> list[float]:
    return [round(float(read().args[0][0, 0, 0, 0]), 1) for read in samples.read]


def test_folders_are_classes_in_the_order_of_their_names(photos: Path) -> None:
    samples = read_samples(photos, EXAMPLE, PREPROCESSING)
    assert samples.labels == (0, 0, 1)
    assert samples.classes == 2
    assert samples.names == ("cat/a.png", "cat/b.png", "dog/a.png")
    assert brightness(samples) == [0.0, 0.2, 0.4]


def test_folders_named_by_numbers_are_these_classes(tmp_path: Path) -> None:
    for number in (7, 10):
        picture(tmp_path / str(number) / "a.png", 9)
    samples = read_samples(tmp_path, EXAMPLE, PREPROCESSING)
    assert (samples.labels, samples.classes) == ((10, 7), None)  # '10' sorts before '7'


def test_pictures_beside_each_other_have_no_labels(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 9)
    assert read_samples(tmp_path, EXAMPLE, PREPROCESSING).labels is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "picture,label\ncat/b.png,3\ndog/a.png,1\n"),
        ("labels.csv", "cat/b.png,3\ndog/a.png,1"),
        ("labels.txt", "cat/b.png 3\ndog/a.png  1\n"),
    ],
)
def test_a_list_gives_pictures_and_labels(photos: Path, name: str, text: str) -> None:
    (photos / name).write_text(text)
    for given in (photos / name, photos):  # by its name, or found in the folder
        samples = read_samples(given, EXAMPLE, PREPROCESSING)
        assert (samples.labels, brightness(samples)) == ((3, 1), [0.2, 0.4])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png", "a picture and its label in every line of .*, got 1 value in line 1"),
        ("cat/a.png,1\nnone.png,2", "names the picture 'none.png', which is not there"),
        ("picture,label", "names no pictures; give one and its label in each line"),
    ],
)
def test_a_list_that_cannot_be_followed_is_one_sentence(
    photos: Path, text: str, message: str
) -> None:
    (photos / "list.csv").write_text(text)
    with pytest.raises(CalibrationError, match=message):
        read_samples(photos / "list.csv", EXAMPLE, PREPROCESSING)


def test_pictures_need_a_preprocessing(photos: Path) -> None:
    with pytest.raises(CalibrationError, match="how a picture becomes the model's input"):
        read_samples(photos, EXAMPLE)


def test_an_npz_may_hold_labels(tmp_path: Path) -> None:
    arrays = np.random.default_rng(0).random((5, 3, 4, 4), dtype=np.float32)
    np.savez(tmp_path / "a.npz", x=arrays, labels=np.arange(5))
    samples = read_samples(tmp_path / "a.npz", EXAMPLE, names=("x",))
    assert samples.labels == (0, 1, 2, 3, 4)
    assert torch.equal(samples.read[2]().args[0], torch.from_numpy(arrays[2:3]))


def test_labels_are_never_taken_from_an_argument_of_that_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", y=np.random.default_rng(0).random((5, 3, 4, 4)))
    assert read_samples(tmp_path / "a.npz", EXAMPLE, names=("y",)).labels is None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(4), "a label for each of the 5 samples of 'a.npz', got 4"),
        (np.zeros(5), "an integer per sample as 'labels' in .*, got 5 of float64"),
    ],
)
def test_labels_that_do_not_fit_are_one_sentence(
    tmp_path: Path, labels: np.ndarray, message: str
) -> None:
    np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).random((5, 3, 4, 4)), labels=labels)
    with pytest.raises(CalibrationError, match=message):
        read_samples(tmp_path / "a.npz", EXAMPLE, names=("x",))


def test_a_loader_gives_its_labels_along() -> None:
    loader = [(torch.rand(2, 3, 4, 4), torch.tensor([4, 5])), (torch.rand(1, 3, 4, 4), 6)]
    samples = read_samples(loader, EXAMPLE)
    assert samples.labels == (4, 5, 6)
    assert [read().args[0].shape[0] for read in samples.read] == [1, 1, 1]


def test_every_fourth_sample_is_held_out() -> None:
    samples = read_samples(torch.rand(9, 3, 4, 4), EXAMPLE)
    kept, out = held_out(samples)
    assert out.names == ("sample 3", "sample 7")
    assert set(kept.names) | set(out.names) == set(samples.names)
    assert out.source == "2 of the 9 samples of 1 given case, held out"


def test_of_few_samples_none_is_spared_and_it_is_said() -> None:
    samples = read_samples(torch.rand(7, 3, 4, 4), EXAMPLE)
    kept, out = held_out(samples)
    assert kept.names == out.names
    assert out.source == "the 7 samples that int8 is calibrated on"


def test_samples_come_in_batches_as_large_as_the_examples() -> None:
    samples = read_samples(torch.rand(5, 3, 4, 4), EXAMPLE)
    batches = list(samples.batches(Case((torch.zeros(2, 3, 4, 4),))))
    assert [batch.args[0].shape for batch in batches] == [(2, 3, 4, 4)] * 2


def test_calibration_comes_in_the_examples_batches_spread_over_all() -> None:
    samples = read_samples(torch.rand(11, 3, 4, 4), EXAMPLE)
    example = Case((torch.zeros(2, 3, 4, 4),))
    assert [case.args[0].shape[0] for case in calibration_cases(samples, example, 256)] == [2] * 5
    few = calibration_cases(samples, example, 4)
    assert len(few) == 2
    assert torch.equal(few[0].args[0][:1], samples.read[0]().args[0])
    assert len(calibration_cases(samples, EXAMPLE, 4)) == 4
    with pytest.raises(CalibrationError, match="Expected at least 16 samples to calibrate on"):
        calibration_cases(samples, Case((torch.zeros(16, 3, 4, 4),)), 256)
