"""`torchfuse export MODEL -o OUT`: what the function writes, from a shell."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import torchfuse
from torchfuse import model_source
from torchfuse.cli import cli
from torchfuse.commands.dynamic_sizes import DynamicSize, parse_sizes
from torchfuse.errors import (
    CalibrationError,
    InputError,
    TorchfuseError,
    UnsupportedError,
)
from torchfuse.targets.opening import check
from torchfuse.targets.torchscript import scripting

NETS = """
from pathlib import Path

import torch
from torch import nn

if (Path(__file__).parent / "must_not_run").exists():
    (Path(__file__).parent / "was_run").touch()


def settled(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Sequential(nn.ConvTranspose2d(3, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.conv(self.up(x)).mean((2, 3)))


def net():
    return settled(Net()), torch.randn(1, 3, 8, 8)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4)

    def forward(self, tokens, mask, scale=1.0):
        return self.embed(tokens) * mask * scale


def pair():
    return Pair(), (torch.randn(2, 7, 4), torch.ones(2, 7, 1), 2.0)


class Nested(nn.Module):
    def forward(self, x, pair):
        return x + pair[0] * pair[1]


def nested():
    return Nested(), (torch.ones(2), (torch.ones(2), torch.ones(2)))


def wrong():
    return Pair(), (torch.ones(2),)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(1, 3, 8, 8)
"""
PICTURES = ("--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    np.save("inputs.npy", np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32))
    return tmp_path


def run(what: str, *arguments: object) -> Result:
    return CliRunner().invoke(cli, ["export", f"nets.py:{what}", *map(str, arguments)])


def model_of(what: str) -> torch.nn.Module:
    model = model_source.load(f"nets.py:{what}").model
    assert isinstance(model, torch.nn.Module)
    return model


def test_the_files_that_bench_compares_are_made_by_three_commands(folder: Path) -> None:
    said = {}
    for out, *options in (["not_fused.pt", "--no-optimize"], ["fused.pt"], ["model.pte"]):
        result = run("net", "-o", out, *options)
        assert result.exit_code == 0, result.output
        assert f"\nWrote {out} ({(folder / out).stat().st_size:,} bytes).\n" in result.stdout
        assert "compared with the model on the example: output: max abs" in result.stdout
        said[out] = result.stdout
    assert "batch norms: 2 in the model, 2 in the file" in said["not_fused.pt"]
    assert "batch norms: 2 in the model, none in the file" in said["fused.pt"]
    assert "100.0% of the MACs" in said["model.pte"]
    x = torch.randn(1, 3, 8, 8)
    expected = model_of("net")(x)
    for out in said:
        torch.testing.assert_close(torchfuse.load(out)(x), expected)


def test_a_fused_file_has_no_batch_norm_in_its_graph_and_the_other_has_all(folder: Path) -> None:
    for out, options, left in (("fused.pt", (), 0), ("not.pt", ("--no-optimize",), 2)):
        assert run("net", "-o", out, *options).exit_code == 0
        assert scripting.batch_norms(torchfuse.load(out)) == left


@pytest.mark.filterwarnings("ignore::torchfuse.DelegationWarning")
def test_fp16_and_weights_and_inputs_are_taken(folder: Path) -> None:
    model = model_of("plain")
    torch.save({name: value * 2 for name, value in model.state_dict().items()}, "w.pt")
    result = run(
        "plain", "-o", "m.pte", "--precision", "fp16", "--weights", "w.pt", "--input", "2x3x9x9"
    )
    assert result.exit_code == 0, result.output
    x = torch.randn(2, 3, 9, 9)
    model.load_state_dict(torch.load("w.pt"))
    assert torchfuse.verify(model, torchfuse.load("m.pte"), x, min_sqnr_db=40).passed
    assert check("m.pte").metadata["precision"] == "fp16"


def test_int8_is_calibrated_on_data(folder: Path) -> None:
    result = run("plain", "-o", "m.pte", "--precision", "int8", "--data", "inputs.npy")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("m.pte: int8 .pte, ")
    assert check("m.pte").metadata["precision"] == "int8"


def test_a_float_file_is_compared_on_data_too_and_the_file_says_so(folder: Path) -> None:
    result = run("plain", "-o", "m.pte", "--data", "inputs.npy")
    assert result.exit_code == 0, result.output
    assert "compared with the model on the example and 8 inputs of 'inputs.npy':" in result.stdout
    assert check("m.pte").metadata["verified_on"] == "the example and 8 inputs of 'inputs.npy'"


def test_a_check_on_random_inputs_only_says_so(folder: Path) -> None:
    for given in ((), ("--data", "random")):
        result = run("plain", "-o", "m.pt", "--input", "1x3x8x8", *given)
        assert result.exit_code == 0, result.output
        assert "compared with the model on random inputs only:" in result.stdout


def test_pictures_become_inputs_and_the_file_says_how(folder: Path) -> None:
    Path("pictures").mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(f"pictures/{number}.png")
    given = ("--precision", "int8", "--data", "pictures", *PICTURES)
    assert run("plain", "-o", "m.pte", *given).exit_code == 0
    assert check("m.pte").metadata["preprocessing"]["size"] == [8, 8]
    model = model_of("plain")
    made = torchfuse.Preprocessing((8, 8), (0.5,) * 3, (0.25,) * 3)
    x = made.normalised(made.pixels(Path("pictures/0.png")))
    assert torchfuse.verify(model, torchfuse.load("m.pte"), x, min_sqnr_db=25).passed


@pytest.mark.filterwarnings("ignore::torchfuse.DelegationWarning")
def test_the_normalisation_goes_inside_without_data_too(folder: Path) -> None:
    result = run("plain", "-o", "m.pte", "--preprocess-inside", *PICTURES)
    assert result.exit_code == 0, result.output
    assert torchfuse.load("m.pte")(torch.zeros(1, 8, 8, 3, dtype=torch.uint8)).shape == (1, 4, 6, 6)


@pytest.mark.filterwarnings("ignore:'m.pte' was calibrated on random:torchfuse.ExportWarning")
def test_noise_is_said_to_be_noise(folder: Path) -> None:
    result = run("plain", "-o", "m.pte", "--precision", "int8", "--data", "random")
    assert result.exit_code == 0, result.output
    assert "The file was calibrated on random inputs, so it is for measuring speed" in result.stdout


def test_an_axis_without_a_name_is_that_of_every_input(folder: Path) -> None:
    result = run("pair", "-o", "m.pte", "--dynamic", "0=1..5")
    assert result.exit_code == 0, result.output
    described = repr(torchfuse.load("m.pte"))
    assert "(1…5)×7×4 float32, (1…5)×7×1 float32, a number" in described


def test_axes_that_are_always_the_same_size_are_given_together(folder: Path) -> None:
    result = run("pair", "-o", "m.pte", "--dynamic", "tokens:1,mask:1=2..9")
    assert result.exit_code == 0, result.output
    loaded, model = torchfuse.load("m.pte"), model_of("pair")
    given = torch.randn(2, 3, 4), torch.ones(2, 3, 1), 2.0
    assert "2×(2…9)×4 float32, 2×(2…9)×1 float32" in repr(loaded)
    assert loaded(*given).shape == model(*given).shape
    apart = run("pair", "-o", "m.pte", "--dynamic", "tokens:1=2..9")
    assert isinstance(apart.exception, UnsupportedError)
    assert "with these dynamic shapes: " in str(apart.exception)


def test_sizes_are_parsed_into_places_and_bounds() -> None:
    assert parse_sizes(["x:2,3=64..512"]) == [
        DynamicSize("x:2,3=64..512", (("x", 2), (None, 3)), 64, 512)
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ("-o m.pte --precision int8", InputError, "int8 needs --data: the inputs"),
        ("-o m.pte --no-optimize", InputError, "so there is no non-fused '.pte'; compare with"),
        ("-o m.pt --precision fp16", UnsupportedError, r"'\.pt' has no fp16; use '\.pte'"),
        ("-o m.ptl --dynamic 0=1..4", InputError, "'.ptl' takes inputs of any size; leave the dy"),
        ("-o m.pte --dynamic 0=4", InputError, "'0=4' is not a dynamic size: expected axes and"),
        ("-o m.pte --dynamic -1=1..4", InputError, "'-1=1..4' is not a dynamic size: expected ax"),
        ("-o m.pte --dynamic 0=4..4", InputError, "larger one after it, got 4 and 4"),
        ("-o m.pte --dynamic 0=0..4", InputError, "a smallest size of 1 or more .* got 0 and 4"),
        ("-o m.pte --precision int8 --data none.npy", CalibrationError, "none.npy', which is no"),
        ("-o m.pte --precision int8 --data .", CalibrationError, "'.' is a folder of pictures, so"),
        ("-o m.pte --mean 0,0,0", InputError, "Expected --mean and --std together"),
        ("-o m.pte --mean 0,0 --std 1,1,1", InputError, "Expected --mean as three numbers"),
        ("-o m.pte --preprocess-inside", InputError, "--preprocess-inside needs --mean and --std"),
        ("-o m.pte --weights none.pt", InputError, "The file 'none.pt' does not exist"),
        ("-o m.pte --weights nets.py", InputError, "--weights takes a state dict in a .pt"),
        ("-o m.pte --input 1xx3", InputError, "'1xx3' is not an input: expected sizes"),
    ],
)
def test_a_mistake_is_one_sentence_before_the_models_code_is_run(
    folder: Path, arguments: str, error: type[TorchfuseError], message: str
) -> None:
    Path("must_not_run").touch()
    result = run("net", *arguments.split())
    assert isinstance(result.exception, error), result.output
    with pytest.raises(error, match=message):
        raise result.exception
    assert not Path("was_run").exists()
    assert not list(folder.glob("m.*"))


@pytest.mark.parametrize(
    ("what", "size", "message"),
    [
        ("pair", "2=1..4,0=1..2", "is not a dynamic size"),
        ("pair", "3=1..4", "is about axis 3 of 'tokens', .* are tokens with 3, mask with 3"),
        ("pair", "scale:0=1..4", "is about axis 0 of 'scale', which is not there"),
        ("pair", "x:0=1..4", "is about axis 0 of 'x', which is not there; the tensors that forw"),
        ("pair", "0,mask:0=1..4", "--dynamic 0,mask:0=1..4: axis 0 of 'mask' is given twice"),
        ("nested", "0=1..4", "about every input, which takes tensors .* got pair; name those"),
        ("wrong", "0=1..4", "Pair does not take its example inputs, forward.2.: missing a requir"),
    ],
)
def test_a_size_that_the_model_has_not_is_one_sentence(
    folder: Path, what: str, size: str, message: str
) -> None:
    result = run(what, "-o", "m.pte", "--dynamic", size)
    assert isinstance(result.exception, InputError), result.output
    with pytest.raises(InputError, match=message):
        raise result.exception
    assert not Path("m.pte").exists()


def test_an_exported_program_is_refused_before_it_is_read(folder: Path) -> None:
    result = CliRunner().invoke(cli, ["export", "none.pt2", "-o", "m.pte"])
    assert isinstance(result.exception, InputError)
    assert "Expected a model, got the exported program 'none.pt2'" in str(result.exception)


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from torchfuse.cli import cli\n"
        "cli.main(['export', '--help'], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"torchfuse export net.py:build -o not_fused.pt --no-optimize\n" in done.stdout
