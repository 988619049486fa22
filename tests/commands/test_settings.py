"""Options that a project keeps in a file, for any command."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import torchfuse
from torchfuse.cli import cli
from torchfuse.errors import InputError

NET = """
from torch import nn, ones


def net():
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), ones(1, 3, 4, 4)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, words)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("torchfuse.toml", "[plan]\ntarget = 'openvino'\n[compare]\nruns = 9\n"),
        ("pyproject.toml", "[tool.torchfuse.plan]\ntarget = 'openvino'\n"),
    ],
)
def test_a_commands_options_come_from_the_file(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    assert "Fusing is not worth it for OpenVINO" in run("plan", "net.py:net").stdout
    assert "for PyTorch eager mode" in run("plan", "net.py:net", "--target", "eager").stdout


def test_options_that_can_be_given_several_times_are_lists(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {}
    monkeypatch.setattr(torchfuse, "compare", lambda *_, **options: given.update(options) or 1 / 0)
    (folder / "torchfuse.toml").write_text(
        "[compare]\ndevice = 'local'\nruns = 9\ntargets = 'pte'\nno-cache = true\n"
    )
    run("compare", "net.py:net")
    assert (given["devices"], given["runs"]) == (("local",), 9)
    assert (given["targets"], given["cache"]) == (["pte"], None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[plam]", r"'torchfuse.toml' has \[plam\], which is no command \(did you mean 'plan'\?\)"),
        ("[plan]\nrulez = 1", r"has 'rulez' in \[plan\], which is no option .* mean 'rule'\?"),
        ("plan = 1", "Expected a table of options as 'plan' in 'torchfuse.toml', got 1"),
        ("[plan", "'torchfuse.toml' cannot be read as TOML"),
    ],
)
def test_what_the_file_cannot_mean_is_one_sentence(folder: Path, text: str, message: str) -> None:
    (folder / "torchfuse.toml").write_text(text)
    result = run("plan", "net.py:net")
    with pytest.raises(InputError, match=message):
        raise AssertionError(result.output) if result.exception is None else result.exception


def test_another_tools_project_file_is_skipped(folder: Path) -> None:
    (folder / "pyproject.toml").write_text("[tool.other]\nx = 1\n")
    assert run("plan", "net.py:net").exit_code == 0
