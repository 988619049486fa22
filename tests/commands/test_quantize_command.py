"""`torchfuse quantize MODEL`: from pictures to a file, and a report."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import torchfuse
from torchfuse import model_source
from torchfuse.cli import cli
from torchfuse.errors import CalibrationError, InputError
from torchfuse.targets.opening import check

NET = """
import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(torch.relu(self.conv(x)), 1).flatten(1))


def net():
    return Net(), torch.randn(1, 3, 8, 8)


def closeness(model):
    return 80 - (model(torch.ones(1, 3, 8, 8)) - Net()(torch.ones(1, 3, 8, 8))).abs().sum().detach()


fallen = iter([1.0])


def falling(model):
    return next(fallen, 0.0)


class Leaving(Net):
    def forward(self, x):
        return F.interpolate(self.conv(torch.asinh(self.conv(x)[:, :3])), scale_factor=2)


def leaving():
    return Leaving(), torch.randn(1, 3, 8, 8)


def mlp():
    return nn.Sequential(nn.Linear(64, 64)), torch.randn(1, 64)
"""
PICTURES = ("--size", "8x8", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path


def run(folder: Path, what: str, *arguments: object) -> Result:
    given = ["quantize", f"{folder / 'net.py'}:{what}", "-o", str(folder / "out.pte")]
    return CliRunner().invoke(cli, [*given, *map(str, arguments)])


def test_pictures_make_an_int8_file_and_a_report(folder: Path) -> None:
    report = folder / "report.json"
    result = run(
        folder, "net", "--data", folder / "pictures", *PICTURES, "--explain", "--json", report
    )
    assert result.exit_code == 0, result.output
    assert "Calibrated on the pictures in 'pictures', 12 samples" in result.stdout
    assert "equalization" in result.stdout
    assert "agreement: 100 % before" in result.stdout
    assert "The 2 layers furthest from float" in result.stdout
    assert f"Wrote {folder / 'out.pte'}" in result.stdout
    assert json.loads(report.read_text())["calibrated"]["samples"] == 12
    assert check(folder / "out.pte").metadata["preprocessing"]["size"] == [8, 8]


def labelled(folder: Path) -> Path:
    """Twelve samples with labels, eleven of them what the model says."""
    model = model_source.load(f"{folder / 'net.py'}:net").model
    x = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = model(x).argmax(1)
    labels[0] = (labels[0] + 1) % 4
    np.savez(folder / "samples.npz", x=x.numpy(), labels=labels.numpy())
    return folder / "samples.npz"


def test_labels_in_the_data_give_top_1_with_its_interval(folder: Path) -> None:
    result = run(folder, "net", "--data", labelled(folder), "--no-recovery")
    assert result.exit_code == 0, result.output
    found = re.search(
        r"top-1: 91.67 % before, .* % after \(95 % interval (.*) … (.*)\)", result.stdout
    )
    assert found is not None, result.stdout
    assert float(found[1]) < 91 < float(found[2])


def test_without_recovery_the_agreement_is_reported_all_the_same(folder: Path) -> None:
    result = run(folder, "net", "--data", folder / "pictures", *PICTURES, "--no-recovery")
    assert result.exit_code == 0, result.output
    assert "outputs at" in result.stdout
    assert "agreement: 100 % before" in result.stdout


def test_folders_that_are_no_classes_of_the_model_are_calibration_data_and_a_note(
    folder: Path,
) -> None:
    for name in ("cats", "dogs"):
        (folder / "pictures" / name).mkdir()
    for picture in (folder / "pictures").glob("*.png"):
        place = "cats" if picture.stem < "5" else "dogs"
        picture.rename(picture.parent / place / picture.name)
    result = run(folder, "net", "--data", folder / "pictures", *PICTURES, "--no-recovery")
    assert result.exit_code == 0, result.output
    assert "Note: accuracy is not measured. Expected labels of the 4 classes" in result.stderr
    assert "top-1" not in result.stdout


def test_an_exported_program_is_quantized_in_the_batches_that_it_takes(folder: Path) -> None:
    model, x = model_source.load(f"{folder / 'net.py'}:net").model, torch.randn(4, 3, 8, 8)
    torch.export.save(torch.export.export(model, (x,)), folder / "net.pt2")
    result = CliRunner().invoke(
        cli,
        ["quantize", str(folder / "net.pt2"), "-o", str(folder / "out.pte"), "--no-recovery",
         "--data", str(labelled(folder))],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "top-1: 91.67 % before" in result.stdout
    assert torchfuse.load(folder / "out.pte")(x).shape == (4, 4)


def test_every_long_step_is_said_with_what_it_is(folder: Path) -> None:
    result = run(folder, "net", "--data", folder / "pictures", *PICTURES)
    assert result.exit_code == 0, result.output
    steps = (
        "reading the data", "capturing the model", "calibrating on 12 samples",
        "trying careful_ranges", "trying equalization", "trying rounding",
        "measuring what was lost", "writing out.pte",
    )  # fmt: skip
    places = [result.stderr.find(f"{step}\n") for step in steps]
    assert -1 not in places, result.stderr
    assert places == sorted(places)


@pytest.mark.filterwarnings("ignore::torchfuse.DelegationWarning")
def test_the_normalisation_goes_inside_when_asked(folder: Path) -> None:
    result = run(
        folder, "net", "--data", folder / "pictures", *PICTURES, "--preprocess-inside",
        "--no-recovery",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Recovery" not in result.stdout
    pixels = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    assert torchfuse.load(folder / "out.pte")(pixels).shape == (1, 4)


@pytest.mark.filterwarnings("ignore:The model has linear layers")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [((), "Quantized: int8_dynamic"), (("--scheme", "int4"), "Quantized: int4")],
)
def test_a_linear_model_needs_no_data(folder: Path, arguments: tuple[str], said: str) -> None:
    result = run(folder, "mlp", *arguments)
    assert result.exit_code == 0, result.output
    assert said in result.stdout


def test_the_size_of_pictures_is_the_examples_unless_given(folder: Path) -> None:
    result = run(folder, "net", "--data", folder / "pictures", *PICTURES[2:], "--no-recovery")
    assert result.exit_code == 0, result.output
    assert check(folder / "out.pte").metadata["preprocessing"]["size"] == [8, 8]


def test_the_users_own_measure_is_named_by_its_file(folder: Path) -> None:
    result = run(
        folder, "net", "--data", folder / "pictures", *PICTURES, "--max-drop", "5",
        "--evaluate", f"{folder / 'net.py'}:closeness",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "closeness: 80 before" in result.stdout


def unmet(folder: Path, *arguments: object) -> Result:
    """A measure that falls by one point whatever stays in float."""
    return run(
        folder, "net", "--data", folder / "pictures", *PICTURES, "--max-drop", "0.5",
        "--evaluate", f"{folder / 'net.py'}:falling", "--json", folder / "report.json", *arguments,
    )  # fmt: skip


def test_a_drop_that_cannot_be_avoided_ends_with_status_1_and_writes_nothing(folder: Path) -> None:
    result = unmet(folder)
    assert result.exit_code == 1
    assert not (folder / "out.pte").exists()
    assert "Wrote" not in result.stdout
    assert result.stderr.endswith(
        f"torchfuse: '{folder / 'out.pte'}' was to lose at most 0.5 points of falling (--max-drop) "
        "and loses 1 with every layer in float; nothing was written: --keep-anyway writes it all "
        "the same.\n"
    )
    report = json.loads((folder / "report.json").read_text())
    assert report["max_drop"] == {
        "measure": "falling",
        "asked": 0.5,
        "reached": 1.0,
        "met": False,
    }
    assert report["written"] is False


def test_a_file_that_lost_too_much_is_written_where_that_is_wanted(folder: Path) -> None:
    result = unmet(folder, "--keep-anyway")
    assert result.exit_code == 1
    assert check(folder / "out.pte").metadata is not None
    assert "loses 1 with every layer in float; it was written all the same.\n" in result.stderr
    assert json.loads((folder / "report.json").read_text())["written"] is True


def test_a_drop_that_is_met_is_in_the_report_too(folder: Path) -> None:
    result = run(
        folder, "net", "--data", folder / "pictures", *PICTURES, "--max-drop", "50",
        "--json", folder / "report.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((folder / "report.json").read_text())
    assert report["max_drop"]["met"] is True
    assert report["written"] is True


@pytest.mark.filterwarnings("ignore::torchfuse.DelegationWarning")
def test_what_runs_where_is_listed_with_the_conversions_in_between(folder: Path) -> None:
    report = folder / "report.json"
    result = run(
        folder, "leaving", "--data", folder / "pictures", *PICTURES, "--no-recovery",
        "--json", report,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "asinh: its partitioner has no rule for this operator" in result.stdout
    assert "int8 becomes float and int8 again once, around:\n  asinh" in result.stdout
    delegation = json.loads(report.read_text())["delegation"]
    assert [conversion["around"] for conversion in delegation["conversions"]] == [["asinh"]]


def test_labels_give_top_1(folder: Path) -> None:
    np.save(folder / "labels.npy", np.arange(12) % 4)
    given = ("--data", folder / "pictures", *PICTURES, "--no-recovery")
    result = run(folder, "net", *given, "--labels", folder / "labels.npy")
    assert result.exit_code == 0, result.output
    assert "top-1: " in result.stdout
    np.save(folder / "labels.npy", np.arange(11) % 4)
    result = run(folder, "net", *given, "--labels", folder / "labels.npy")
    assert "an integer label for each of the 12 calibration samples" in str(result.exception)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.* was traced:torchfuse.ExportWarning")
def test_torchscript_files_are_made_for_an_engine(folder: Path) -> None:
    given = ["quantize", f"{folder / 'net.py'}:net", "--data", str(folder / "pictures"), *PICTURES]
    wanted = CliRunner().invoke(cli, [*given, "-o", str(folder / "out.pt"), "--backend", "x86"])
    assert wanted.exit_code == 0, wanted.output
    assert "Quantized: int8 for x86" in wanted.stdout
    assert check(folder / "out.pt").metadata["precision"] == "int8"
    forgotten = CliRunner().invoke(cli, [*given, "-o", str(folder / "out.pt")])
    assert "ends in .pte or .onnx or .xml for xnnpack, got" in str(forgotten.exception)
    assert "or give --backend" in str(forgotten.exception)


@pytest.mark.filterwarnings("ignore::torchfuse.DelegationWarning")
def test_fp16_needs_no_data(folder: Path) -> None:
    result = run(folder, "net", "--scheme", "fp16")
    assert result.exit_code == 0, result.output
    assert check(folder / "out.pte").metadata["precision"] == "fp16"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((), CalibrationError, "Expected calibration data, got None"),
        (("--data", "nowhere"), CalibrationError, "got 'nowhere', which is no such file"),
        (("--size", "8x8"), InputError, "Expected --mean and --std together"),
        (("--size", "8", "--mean", "0,0,0", "--std", "1,1,1"), InputError, "--size as HxW"),
        (("--recover", "rounding", "--no-recovery"), InputError, "got both"),
        (("--preprocess-inside",), InputError, "--preprocess-inside needs --mean"),
        (("--data", "random", "--evaluate", "nets.pt2"), InputError, "Expected a function"),
        (("--no-recovery", "--max-drop", "1"), InputError, "Expected --no-recovery or --max-drop"),
        (("--data", "random", "--labels", "net.py"), InputError, "Expected integers as labels, in"),
        (
            ("--data", "random", "--size", "9x9", *PICTURES[2:]),
            InputError,
            "Expected --size 8x8, the size of the example input, got 9x9",
        ),
        (("--keep-anyway",), InputError, "--keep-anyway is about --max-drop"),
        (("--scheme", "fp16", "--max-drop", "1"), InputError, "--max-drop is about what quantizi"),
        (("--data", "."), CalibrationError, "folder of pictures, .* give --mean and --std"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    folder: Path, arguments: tuple[str, ...], error: type[Exception], message: str
) -> None:
    result = run(folder, "net", *arguments)
    assert isinstance(result.exception, error)
    assert re.search(message, str(result.exception))
    assert not (folder / "out.pte").exists()


@pytest.mark.parametrize("name", ["labels.csv", "labels.txt"])
def test_labels_may_be_text(folder: Path, name: str) -> None:
    (folder / name).write_text("\n".join(str(i % 4) for i in range(12)))
    result = run(
        folder, "net", "--data", folder / "pictures", *PICTURES, "--no-recovery",
        "--labels", folder / name,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    said = r"top-1: [\d.]+ % before, [\d.]+ % after \(95 % interval .*\), on the 12 calibration"
    assert re.search(said, result.stdout)


def test_the_size_of_pictures_says_what_the_input_is_where_nothing_else_does(folder: Path) -> None:
    with (folder / "net.py").open("a") as file:
        file.write("\n\ndef alone():\n    return Net()\n")
    result = run(folder, "alone", "--data", folder / "pictures", *PICTURES, "--no-recovery")
    assert result.exit_code == 0, result.output
    metadata = check(folder / "out.pte").metadata
    assert metadata["inputs"]["args"] == [{"ones": [1, 3, 8, 8], "dtype": "float32"}]


@pytest.mark.filterwarnings("ignore::torchfuse.DelegationWarning")
def test_a_file_that_normalises_does_not_tell_its_reader_to(folder: Path) -> None:
    result = run(
        folder, "net", "--data", folder / "pictures", *PICTURES, "--preprocess-inside",
        "--no-recovery",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    kept = check(folder / "out.pte").metadata["preprocessing"]
    assert kept == {"size": [8, 8], "layout": "NHWC", "dtype": "uint8"}


def test_a_measure_that_raises_is_one_sentence(folder: Path) -> None:
    with (folder / "net.py").open("a") as file:
        file.write("\n\ndef broken(model):\n    return 1 / 0\n")
    result = run(folder, "net", "--data", "random", "--evaluate", f"{folder / 'net.py'}:broken")
    assert str(result.exception).startswith(
        "broken ended in ZeroDivisionError: division by zero. It is called with the model"
    )


def test_json_on_stdout_is_json_alone_and_says_which_file_it_is_of(folder: Path) -> None:
    result = run(folder, "net", "--data", folder / "pictures", *PICTURES, "--json", "-")
    found = json.loads(result.stdout)
    data = (folder / "out.pte").read_bytes()
    assert (found["file"], found["size_bytes"]) == (str(folder / "out.pte"), len(data))
    assert found["sha256"] == hashlib.sha256(data).hexdigest()
    assert found["versions"]["torch"] == torch.__version__
    assert "UserWarning" not in result.stderr


def test_a_range_that_settled_is_not_blamed_on_few_samples(folder: Path) -> None:
    same = np.random.default_rng(0).random((1, 3, 8, 8), np.float32)
    np.save(folder / "same.npy", np.repeat(same, 12, 0))
    result = run(folder, "net", "--data", folder / "same.npy", "--no-recovery", "--explain")
    assert "the ranges had settled" in result.stdout
    assert "few samples" not in result.stdout
