"""The native loop that benchmarks/overhead.py compares torchfuse's own with."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

NATIVE = Path(__file__).resolve().parents[1] / "benchmarks" / "native"


@pytest.fixture(scope="module")
def building() -> ModuleType:
    spec = importlib.util.spec_from_file_location("building", NATIVE / "building.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["building"] = module  # where its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_loop_on_executorchs_runtime_is_built_and_times_every_call(
    building: ModuleType, tmp_path: Path, model_files: Callable[[str], str]
) -> None:
    native = building.build_pte_loop(tmp_path)
    assert str(Path.home()) not in native.command
    assert "-isystem $EXECUTORCH/include" in native.command
    done = subprocess.run(
        [native.path, model_files("third.pte"), "1", "3", "7"],
        capture_output=True,
        text=True,
        check=True,
    )
    times = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(times) == 7
    assert all(whole_ns >= program_ns > 0 for whole_ns, program_ns in times)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_loop_that_cannot_be_built_says_what_to_do(building: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "speed_benchmark_torch.cc"
    source.write_text("#error this is not the file\n")
    with pytest.raises(
        building.NotBuiltError, match=r"(?s)this is not the file.*it takes g\+\+ 11 or newer"
    ):
        building.build_speed_benchmark(tmp_path, source)
