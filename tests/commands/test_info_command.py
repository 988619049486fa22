"""`torchfuse info`: what a file says of itself, and what a model is."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import torchfuse
from torchfuse.cli import cli
from torchfuse.errors import ArtifactError, InputError

NET = """
from torch import nn, ones


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), ones(1, 3, 8, 8)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def info(*words: str):
    return CliRunner().invoke(cli, ["info", *words])


def test_a_model_is_told_with_its_figures(folder: Path) -> None:
    found = json.loads(info("net.py:net", "--json", "-").stdout)
    assert found["parameters"] == 4 * 3 * 9 + 4 + 8
    assert found["macs"] == 4 * 3 * 9 * 36
    assert found["outputs"] == {"output": "1×4×6×6 float32"}
    assert found["layers"] == {"BatchNorm2d": 1, "Conv2d": 1}
    shown = info("net.py:net", "--input", "2x3x10x10").stdout
    assert "inputs: 2x3x10x10:float32\n" in shown
    assert "output 2×4×8×8 float32" in shown


def test_a_file_is_told_as_it_was_sealed(folder: Path) -> None:
    preprocessing = {"size": [8, 8]}
    x = torch.ones(1, 3, 8, 8)
    made = torchfuse.export(nn.ReLU().eval(), x, "a.pt", preprocessing=preprocessing)
    result = info("a.pt", "--json", "a.json")
    assert result.exit_code == 0, result.output
    assert "precision: fp32\n" in result.stdout
    assert "inputs: 1x3x8x8:float32\n" in result.stdout
    assert "checksum: in the file, and right\n" in result.stdout
    found = json.loads(Path("a.json").read_text())
    assert (found["sha256"], found["size_bytes"]) == (made.sha256, made.size_bytes)
    assert found["preprocessing"] == preprocessing
    assert found["made_by"]["torch"] == torch.__version__


def test_an_int8_file_says_what_it_was_made_of_and_compared_on(folder: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torchfuse.export(model, x, "a.pte", precision="int8", calibration=[x] * 10)
    shown = info("a.pte").stdout
    assert "precision by layer: 2 layers in int8, none in float\n" in shown
    assert "calibrated on: 10 given cases, 10 samples\n" in shown
    assert " dB, against Sequential on the example and 5 inputs of 10 given cases\n" in shown
    quantized = torchfuse.quantize(model, x, [x] * 10).model
    torchfuse.export(quantized, x, "b.pte")
    shown = info("b.pte").stdout
    assert "calibrated on: 10 given cases, 10 samples\n" in shown
    assert "against the quantized model on the example\n" in shown


def test_an_exported_program_is_told_by_its_operators_and_as_a_file(folder: Path) -> None:
    program = torch.export.export(nn.Conv2d(3, 4, 3).eval(), (torch.ones(1, 3, 8, 8),))
    torch.export.save(program, "a.pt2")
    found = json.loads(info("a.pt2", "--json", "-").stdout)
    assert found["layers"] == {"conv2d": 1}
    assert found["sha256"] == hashlib.sha256(Path("a.pt2").read_bytes()).hexdigest()


def test_a_damaged_file_is_an_error(folder: Path) -> None:
    torchfuse.export(nn.ReLU().eval(), torch.ones(1, 3), "a.pt")
    data = bytearray(Path("a.pt").read_bytes())
    data[len(data) // 2] ^= 1
    Path("a.pt").write_bytes(data)
    assert isinstance(info("a.pt").exception, ArtifactError)


def test_an_example_is_for_a_model(folder: Path) -> None:
    assert isinstance(info("a.pt", "--input", "1x3").exception, InputError)
