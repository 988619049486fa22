"""The stand-in for ExecuTorch's executor_runner gives what the runtime gives, in its words."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import torchfuse


def test_it_gives_what_the_wheels_own_runtime_gives(
    executor_runner: Path, model_files: Callable[[str], str], tmp_path: Path
) -> None:
    model = model_files("third.pte")
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x.numpy().tofile(tmp_path / "x.bin")
    command = [executor_runner, f"--model_path={model}", "--cpu_threads=1", "--num_executions=5"]
    command += [f"--inputs={tmp_path}/x.bin", f"--output_file={tmp_path}/y"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    said = ran.stdout + ran.stderr
    assert len(re.findall(r"Iteration \d of 5: [\d.]+ ms", said)) == 5
    assert re.search(r"Model executed successfully 5 time\(s\) in [\d.]+ ms", said)
    there = np.fromfile(tmp_path / "y-0.bin", np.float32)
    assert np.array_equal(there, torchfuse.load(model)(x).numpy().ravel())


@pytest.mark.parametrize(
    "options", [["--model_path=none.pte"], ["--no_such_option=1"], ["--inputs=none.bin"]]
)
def test_it_fails_as_the_real_one(
    executor_runner: Path,
    model_files: Callable[[str], str],
    tmp_path: Path,
    options: list[str],
) -> None:
    command = [executor_runner, f"--model_path={model_files('third.pte')}", *options]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode != 0
    assert ran.stderr
