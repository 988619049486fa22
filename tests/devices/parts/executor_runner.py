"""executor_runner.cpp, built against the headers of ExecuTorch's wheel and a wheel's own runtime.

For this machine it is linked to the wheel that is installed, for the phone to the runtime in
executorch-numpy-runtime. Both are Python modules, so that it needs Python's library as well, of
which it calls nothing.
"""

import importlib.metadata
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from devices.parts import arm64_root, cache

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILER = "aarch64-linux-gnu-g++"
PACKAGES = "usr/lib/python3/dist-packages"
NEEDED = [COMPILER]


def for_phone() -> Path:
    """The path of executor_runner for the phone."""
    root = arm64_root.root()
    runtime = "executorch_numpy_runtime"

    def build(out: Path) -> None:
        libraries = [f"-L{root}/{PACKAGES}/{runtime}", "-l:_core.abi3.so"]
        libraries += [f"-L{root}/usr/lib/aarch64-linux-gnu", f"-l:{arm64_root.LIBPYTHON}"]
        libraries += [f"-Wl,-rpath,/{PACKAGES}/{runtime}"]
        _compile(COMPILER, libraries, out / "executor_runner")

    made = cache.kept(
        "executor_runner-arm64", build, sys.modules[__name__], SOURCE.read_text(), root.name
    )
    return made / "executor_runner"


def for_this_machine() -> Path:
    """The path of executor_runner for this machine, with the ExecuTorch of this Python."""
    folder = _executorch()
    parts = ("", "_backend_xnnpack", "_kernels_optimized", "_kernels_quantized", "_threadpool")

    def build(out: Path) -> None:
        libraries = [f"-L{folder}/lib", f"-Wl,-rpath,{folder}/lib"]
        libraries += [f"-lexecutorch{part}" for part in parts]
        _compile("g++", libraries, out / "executor_runner")

    made = cache.kept(
        "executor_runner-here",
        build,
        sys.modules[__name__],
        SOURCE.read_text(),
        f"{folder} {importlib.metadata.version('executorch')}",
    )
    return made / "executor_runner"


def _executorch() -> Path:
    spec = find_spec("executorch")
    assert spec is not None
    return Path(next(iter(spec.submodule_search_locations or ())))


def _compile(compiler: str, libraries: list[str], program: Path) -> None:
    include = _executorch() / "include"
    types = include / "executorch/runtime/core/portable_type/c10"
    command = [compiler, "-std=c++20", "-O2", "-w", "-DC10_USING_CUSTOM_GENERATED_MACROS"]
    command += [f"-I{include}", f"-I{types}", str(SOURCE), "-o", str(program), "-pthread"]
    command += ["-Wl,--allow-shlib-undefined", "-Wl,--no-as-needed", *libraries]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}: {ran.stderr[-2000:]}")
