"""What the command line ends with: one table of statuses for every command."""

import subprocess
import sys
from pathlib import Path

import pytest

from torchfuse import cli
from torchfuse.commands import status
from torchfuse.errors import InputError

NET = """
from torch import nn, ones


def net():
    import os, signal
    if os.environ.get("INTERRUPTED"):
        os.kill(os.getpid(), signal.SIGINT)
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), ones(1, 3, 4, 4)
"""


def ended(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "torchfuse", *words],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "no.py:net"],
        ["plan"],
        ["plan", "--no-such-option"],
        ["no-such-command"],
        ["bench"],
        ["report", "none.json", "-o", "x.html"],
    ],
)
def test_what_cannot_be_done_or_read_is_status_2(words: list[str]) -> None:
    done = ended(*words)
    assert done.returncode == status.ERROR, done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_version_are_status_0() -> None:
    assert ended("--version").returncode == status.FINE
    assert ended("plan", "--help").returncode == status.FINE


@pytest.mark.parametrize("command", ["plan", "fuse", "export", "quantize", "compare"])
def test_ctrl_c_is_status_130_in_every_command(command: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    out = {"fuse": ["-o", "x.pt2"], "export": ["-o", "x.pt"], "quantize": ["-o", "x.pte"]}
    words = out.get(command, [])
    words = [str(tmp_path / w) if w.startswith("x.") else w for w in words]
    done = ended(command, f"{tmp_path}/net.py:net", *words, INTERRUPTED="1")
    assert done.returncode == status.INTERRUPTED, done.stderr
    assert done.stderr.strip() == "torchfuse: interrupted."
    assert done.stdout == ""


def test_a_warning_is_one_line_without_pythons_source(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(f"import warnings\nwarnings.warn('an old way')\n{NET}")
    done = ended("plan", f"{tmp_path}/net.py:net")
    assert done.stderr == "Warning: an old way\n"


def test_an_error_speaks_of_options_and_not_of_pythons_arguments(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "give preprocessing=Preprocessing(size=…, mean=…, std=…), or precision='int8'."

    def fails(**_: object) -> None:
        raise InputError(text)

    monkeypatch.setattr(cli.cli, "main", fails)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == (
        "torchfuse: error: give --size, --mean and --std, or --precision int8.\n"
    )
