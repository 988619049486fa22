"""`torchfuse compare --suite`: what is found before any work; the work: tests/suites."""

import importlib.util
from pathlib import Path

import pytest
from click.testing import CliRunner

from torchfuse.cli import cli
from torchfuse.commands import compare_suite


def error_of(*words: str) -> str:
    result = CliRunner().invoke(cli, ["compare", *words])
    assert result.exception is not None
    return str(result.exception)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "net.py").touch()
    (tmp_path / "suite.toml").write_text('[models.net]\nsource = "net.py:net"\nruns = 1\n')
    return tmp_path


def test_without_dask_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> object:
        return None if name == "distributed" else found(name, package)

    monkeypatch.setattr("torchfuse.suites.cluster.find_spec", without)
    assert error_of("--suite", "suite.toml") == (
        "A suite takes Dask distributed, which is not installed: pip install 'torchfuse[dask]'."
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["net.py:net", "--suite", "suite.toml"], "MODEL is not given with --suite; it belongs"),
        (["--suite", "suite.toml", "--runs", "5"], "--runs is not given with --suite; it belongs"),
        (["net.py:net", "--workers", "2"], "--workers is for suites; give --suite FILE.toml."),
        (["--suite", "suite.toml", "--scheduler", "tcp://h:1"], "--scheduler needs --cache"),
        (
            ["--suite", "suite.toml", "--scheduler", "tcp://h:1", "--workers", "2"],
            "--workers is for this machine; the scheduler has workers of its own.",
        ),
        (["--suite", "suite.toml", "--resume"], "--resume goes on with what --json holds;"),
        (["--suite", "suite.toml"], "'suite.toml', line 3, models.net.runs: Expected 2 or more"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said_at_once(words: list[str], expected: str) -> None:
    assert expected in error_of(*words)


def test_without_a_suite_a_model_is_missing() -> None:
    result = CliRunner().invoke(cli, ["compare"])
    assert result.exit_code == 2
    assert "Missing argument 'MODEL'" in result.output


def test_options_that_suites_share_are_options_of_compare() -> None:
    command = cli.get_command(None, "compare")  # type: ignore[arg-type]  # it needs no context
    assert command is not None
    assert {p.name for p in command.params} >= compare_suite._SHARED
