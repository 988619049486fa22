"""The loops in C++ that the overhead of ours is measured against, on this machine."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import torchfuse
from devices.parts import debian, executor_runner, speed_benchmark

pytestmark = [
    pytest.mark.devices,
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ not installed"),
]


def test_executor_runner_gives_what_the_wheels_own_runtime_gives(
    model_files: Callable[[str], str], tmp_path: Path
) -> None:
    model = model_files("third.pte")
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x.numpy().tofile(tmp_path / "x.bin")
    command = [executor_runner.for_this_machine(), f"--model_path={model}", "--cpu_threads=1"]
    command += [f"--inputs={tmp_path}/x.bin", f"--output_file={tmp_path}/y", "--num_executions=5"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    said = ran.stdout + ran.stderr
    assert len(re.findall(r"Iteration \d of 5: [\d.]+ ms", said)) == 5
    assert re.search(r"Model executed successfully 5 time\(s\) in [\d.]+ ms", said)
    assert np.array_equal(
        np.fromfile(tmp_path / "y-0.bin", np.float32), torchfuse.load(model)(x).numpy().ravel()
    )


@pytest.mark.skipif(
    shutil.which("apt-get") is None or not debian.KEYS.exists(), reason="this is not Debian"
)
def test_speed_benchmark_torch_runs_a_file(model_files: Callable[[str], str]) -> None:
    command = [speed_benchmark.for_this_machine(), f"--model={model_files('third.ptl')}"]
    command += ["--input_dims=1,3,4,4", "--input_type=float", "--warmup=1", "--iter=5"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Main run finished. Microseconds per iter: " in ran.stdout + ran.stderr
