"""`torchfuse compare MODEL`: the table on stdout, or JSON or Markdown; mistakes before any work."""

import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import torchfuse
from torchfuse.cli import cli
from torchfuse.comparing.comparison import NOT_FUSED, Comparison, Row
from torchfuse.errors import TorchfuseError
from torchfuse.measuring.cautions import Caution
from torchfuse.measuring.timing import Measurement
from torchfuse.stats import Ratio
from torchfuse.verifying.equivalence import Equivalence, OutputDifference

NET = """
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    return nn.Sequential(*layers), torch.zeros(1, 3, 8, 8)


def half(run):
    return 0.5
"""
# Leaves a mark when any of its code is run.
MARKED = """
from pathlib import Path
(Path(__file__).parent / "was_run").touch()
"""
ROW = Row(
    NOT_FUSED,
    "eager",
    "fp32",
    Measurement("m", (1e-3,) * 4, 1, True, 1, cautions=(Caution("drift", "it fell", True),)),
    Ratio(1.0, 1.0, 1.0),
    None,
    Equivalence((OutputDifference("output", 0.0, 0.0, float("inf"), True),)),
    None,
    None,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


@pytest.fixture
def measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    """What stands for the measuring, which takes long."""
    comparison = Comparison("Net", (ROW,), ("left out: int8",))
    monkeypatch.setattr(torchfuse, "compare", lambda *_, **__: comparison)
    return comparison


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, ["compare", "net.py:net", *words])


def test_a_model_is_compared_in_every_form(folder: Path) -> None:
    result = run(
        *("--data", "random", "--evaluate", "net.py:half", "--runs", "2", "--folder", "files"),
        *("--json", "-", "--markdown", "table.md"),
    )
    assert result.exit_code == 0, result.output
    comparison = Comparison.from_json(result.stdout)
    assert [(row.target, row.precision) for row in comparison.rows] == [
        *(("eager", "fp32"), ("channels_last", "fp32"), ("eager", "fp32")),
        *((".pt", "fp32"),) * 2,
        *((".ptl", "fp32"),) * 2,
        *((".pte", "fp32"), (".pte", "fp16"), (".pte", "int8")),
    ]
    assert {row.accuracy.value for row in comparison.rows} == {0.5}
    assert comparison.notes[0].startswith("int8 is calibrated on 16 random inputs: its time and")
    assert (folder / "table.md").read_text() == comparison.to_markdown()
    names = {path.name for path in (folder / "files").iterdir()}
    assert {"fp32_fused.pt", "fp32_not_fused.ptl", "int8_folded_by_lowering.pte"} <= names
    assert "saving int8_folded_by_lowering.pte\n" in result.stderr


def test_the_table_is_on_stdout_and_warnings_are_on_stderr(measured: Comparison) -> None:
    result = run("--json", "c.json", "--folder", "files")
    assert result.stdout.startswith("variant")
    assert "fusing was not compared" in result.stdout
    assert "Note: left out: int8\n" in result.stdout
    assert result.stdout.endswith("\nThe files are in files.\n")
    assert result.stderr == "Warning: it fell.\n"
    assert Comparison.from_json(Path("c.json").read_text()) == measured


def test_markdown_can_be_printed_instead(measured: Comparison) -> None:
    assert run("--markdown", "-").stdout == measured.to_markdown()


def test_a_gate_that_fails_ends_it_with_status_1_after_the_table(measured: Comparison) -> None:
    result = run("--fail-if", "eager latency > 0.5 ms", "--fail-if", "size > 1 MB")
    assert result.exit_code == 1
    assert result.stdout.startswith("variant")
    assert result.stderr.splitlines()[1:] == [
        "torchfuse: failed: 'eager latency > 0.5 ms': not fused, eager fp32, has 1 ms.",
        "torchfuse: failed: 'size > 1 MB' could not be judged: its size is not known.",
    ]
    assert run("--fail-if", "eager latency > 2 ms").exit_code == 0


def test_times_that_are_not_to_be_trusted_end_it_with_status_3(measured: Comparison) -> None:
    result = run("--fail-on-noise", "--fail-if", "eager latency > 0.5 ms")
    assert result.exit_code == 3


def test_an_earlier_comparison_is_a_gate(
    measured: Comparison, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_times(seconds: float) -> Comparison:
        latency = replace(ROW.latency, samples_s=(seconds,) * 20)
        return replace(measured, rows=(replace(ROW, latency=latency),))

    (folder / "old.json").write_text(with_times(1e-3).to_json())
    monkeypatch.setattr(torchfuse, "compare", lambda *_, **__: with_times(1.04e-3))
    assert run("--baseline", "old.json", "--fail-if-slower", "5%").exit_code == 0
    result = run("--baseline", "old.json", "--fail-if-slower", "3%")
    assert result.exit_code == 1
    assert (
        "failed: not fused, eager fp32, takes 1.04 times (1.04 … 1.04) as long as" in result.stderr
    )


def test_an_interrupted_run_leaves_what_there_is_and_is_gone_on_with(folder: Path) -> None:
    words = ["--targets", "eager", "--variants", "fused", "--json", "c.json", "--html", "c.html"]
    command = [sys.executable, "-m", "torchfuse", "compare", "net.py:net", *words]
    process = subprocess.Popen(
        [*command, "--runs", "100000"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("timing"):
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    assert errors.endswith(
        "torchfuse: interrupted; the rounds until then are in 'c.json', and --resume goes on with "
        "them.\n"
    )
    found = Comparison.from_json(Path("c.json").read_text())
    assert found.unfinished == "timing on local"
    assert "Not finished:" in Path("c.html").read_text()
    assert 0 < found.rows[0].latency.runs < 100_000
    result = run(*words, "--resume", "--runs", "3")
    assert "its model, data, example, options or versions are not these" in str(result.exception)


def test_a_run_is_gone_on_with_where_it_was(folder: Path) -> None:
    words = ["--targets", "eager", "--variants", "fused", "--json", "c.json", "--runs", "12"]
    assert run(*words).exit_code == 0
    whole = Comparison.from_json(Path("c.json").read_text())

    def cut(row: Row) -> Row:
        first = row.latency.samples_s[: 2 * row.latency.turn_runs]
        return replace(row, latency=replace(row.latency, samples_s=first))

    Path("c.json").write_text(replace(whole, rows=tuple(map(cut, whole.rows))).to_json())
    result = run(*words, "--resume")
    assert result.exit_code == 0, result.output
    again = Comparison.from_json(Path("c.json").read_text())
    for before, after in zip(whole.rows, again.rows, strict=True):
        count = 2 * before.latency.turn_runs
        assert after.latency.samples_s[:count] == before.latency.samples_s[:count]
        assert after.latency.samples_s[count:] != before.latency.samples_s[count:]
        assert after.latency.runs == before.latency.runs


def test_what_was_measured_is_saved_as_it_comes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    monkeypatch.setattr("torchfuse.commands.compare._SAVED_EVERY_S", 0.0)
    monkeypatch.setattr(
        "torchfuse.commands.saved_results.write_atomically",
        lambda _, data: saved.append(data.decode()),
    )
    words = ["--targets", "eager", "--variants", "fused", "--runs", "12", "--json", "c.json"]
    assert run(*words).exit_code == 0
    first, *_, last = map(Comparison.from_json, saved)
    assert first.unfinished == "timing on local"
    assert 0 < first.rows[0].latency.runs < last.rows[0].latency.runs == 12
    assert last.unfinished is None


def test_a_second_run_makes_no_file_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--targets", "pt", "--runs", "2", "--folder", "files", "--json", "-"]
    first = Comparison.from_json(run(*words).stdout)
    monkeypatch.setattr("torchfuse.comparing.jobs.exported", None)
    second = Comparison.from_json(run(*words).stdout)
    assert [row.size_bytes for row in second.rows] == [row.size_bytes for row in first.rows]
    assert second.rows[0].latency.samples_s != first.rows[0].latency.samples_s
    (folder / "net.py").write_text(NET.replace("nn.ReLU()", "nn.ReLU6()"))
    assert isinstance(run(*words).exception, TypeError)  # what is None there is called


def test_ctrl_c_ends_it_with_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torchfuse, "compare", interrupted)
    result = run("--json", "c.json")
    assert (result.exit_code, result.stderr) == (130, "torchfuse: interrupted.\n")
    assert not (folder / "c.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--json missing/c.json", "the folder '.*missing' does not exist; create it first"),
        ("--markdown net.py/x", r"the folder '.*net\.py' does not exist"),
        ("--folder net.py", r"'.*net\.py' is no folder; choose another name"),
        ("--json a --markdown a", "a file for each of --json a, --markdown a, got one twice"),
        ("--json - --markdown -", "Expected one of --json and --markdown as '-', got both"),
        ("--data nowhere.npy", "got 'nowhere.npy', which is no such file"),
        ("--fail-if latency", "'latency' is no condition: expected rows, a quantity, a comparison"),
        ("--baseline c.json", "Expected --baseline and --fail-if-slower together, got one"),
        ("--resume", "--resume goes on with what --json holds; give --json with the file"),
        ("--variants int9", "Expected variants among not fused, fused, fp16, int8, got 'int9'"),
        ("--targets pte,onnyx", "Expected targets among .*, got 'onnyx'"),
        ("--validation nowhere.npz", "Expected --validation as an .npy or .npz file, a folder"),
        ("--size 8x8", "Expected --mean and --std together"),
    ],
)
def test_what_is_wrong_is_known_before_the_model_is_made(
    folder: Path, words: str, message: str
) -> None:
    (folder / "net.py").write_text(MARKED)
    result = run(*words.split())
    assert isinstance(result.exception, TorchfuseError), result.output
    assert re.search(message, str(result.exception)), result.exception
    assert not (folder / "was_run").exists()


def test_an_exported_program_is_compared_with_itself_fused(folder: Path) -> None:
    import torch

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    program = torch.export.export(net, (torch.ones(1, 3, 8, 8),))
    torch.export.save(program, folder / "mine.pt2")
    result = CliRunner().invoke(
        cli, ["compare", "mine.pt2", "--targets", "eager", "--runs", "2", "--json", "-"]
    )
    assert result.exit_code == 0, result.output
    comparison = Comparison.from_json(result.stdout)
    assert comparison.model == "mine"
    assert [row.variant for row in comparison.rows] == [NOT_FUSED, "fused"]
    assert [fusion.rule for fusion in comparison.plan.fusions] == ["conv_bn"]
