"""`torchfuse info`: what a file says of itself, and what a model is."""

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


def test_a_damaged_file_is_an_error(folder: Path) -> None:
    torchfuse.export(nn.ReLU().eval(), torch.ones(1, 3), "a.pt")
    data = bytearray(Path("a.pt").read_bytes())
    data[len(data) // 2] ^= 1
    Path("a.pt").write_bytes(data)
    assert isinstance(info("a.pt").exception, ArtifactError)


def test_an_example_is_for_a_model(folder: Path) -> None:
    assert isinstance(info("a.pt", "--input", "1x3").exception, InputError)
