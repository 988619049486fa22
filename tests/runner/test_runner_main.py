"""`python3 -m torchfuse.runner` where there is neither torchfuse nor torch: the archive alone."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from devices.light_python import light_python
from devices.pausing import pausing_python
from torchfuse.devices.python_runner import runner_archive
from torchfuse.devices.saved_run import run_from_record
from torchfuse.runner.job import read_event

Files = Callable[[str], str]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
INPUT = ("--input", "1x3x4x4")


@pytest.fixture
def python(tmp_path: Path) -> Path:
    return light_python(tmp_path)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "runner.pyz"
    path.write_bytes(runner_archive())
    return path


@pytest.fixture
def run(tmp_path: Path, python: Path, archive: Path) -> Run:
    def ran(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [python, archive, *words], capture_output=True, text=True, cwd=tmp_path, check=False
        )

    return ran


def test_models_are_measured_and_what_it_saves_is_read_elsewhere(
    run: Run, model_files: Files, tmp_path: Path
) -> None:
    model = model_files("third.pte")
    ran = run(model, model, *INPUT, "--runs=20", "--warmup=2", "--save", "saved.txt")
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = ran.stdout.splitlines()
    assert [line.split(" ms (IQR ")[0].rpartition(": ")[0] for line in lines] == [model, model]
    assert all(line.endswith(" ms), 20 runs, threads: 1") for line in lines)
    there = run_from_record(tmp_path / "saved.txt")
    assert there.error is None
    assert there.runner == "executorch-numpy-runtime 1.4.0"
    assert [(m.runs, m.warmup_runs, m.turn_runs) for m in there.measurements] == [(20, 2, 1)] * 2
    assert there.device.architecture == os.uname().machine


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "expected the names of .pte files"),
        (["none.pte", *INPUT], 1, "No such file or directory: 'none.pte'"),
        (["model.pte", "--input=1xa"], 1, "expected an input such as 1x3x224x224 or 1x16:int64"),
        (["model.pte", "--input=1:half"], 1, "expected a type of float32"),
        (["model.pte", "--runs=0"], 2, "--runs must be 1 or more, got 0"),
        (["model.pte", "--threads=-1"], 2, "--threads must be 1 or more, got -1"),
        (["model.pte", "--warmup=-1"], 2, "--warmup must be 0 or more, got -1"),
        (["model.pte", *INPUT, "--save=no/such/folder"], 1, "No such file or directory: 'no/such"),
        (["model.onnx", *INPUT], 1, "expected a .pte, .pt or .ptl file"),
        (["model.pt", *INPUT], 1, "a .pt needs torch, which"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_measured(
    run: Run, tmp_path: Path, words: list[str], status: int, message: str
) -> None:
    for name in ("model.pte", "model.onnx", "model.pt"):
        (tmp_path / name).write_bytes(b"1234ET12")
    ran = run(*words)
    assert (ran.returncode, ran.stdout) == (status, "")
    assert message in ran.stderr.splitlines()[-1]


def test_ctrl_c_leaves_the_rounds_until_then_in_the_file(
    python: Path, archive: Path, model_files: Files, tmp_path: Path
) -> None:
    program, _ = pausing_python(tmp_path, python, "never")
    saved = tmp_path / "saved.txt"
    process = subprocess.Popen(
        [program, archive, model_files("third.pte"), *INPUT, "--runs=100000000", f"--save={saved}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 30
        while not (saved.exists() and '"done": 5,' in saved.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it, too
        printed, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, printed) == (130, "")
    assert errors == f"runner.py: interrupted; '{saved}' holds the rounds until then\n"
    assert all(read_event(line) for line in saved.read_text().splitlines())
    kept = run_from_record(saved)
    assert kept.error is not None
    assert kept.measurements[0].runs >= 5
