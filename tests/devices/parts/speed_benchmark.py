"""PyTorch's real speed_benchmark_torch.cc for the phone, with the lite interpreter as on Android.

Built against torch 2.8.0, the last whose aarch64 wheel needs no GPU's libraries.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from devices.parts import cache, debian

RELEASE = "bookworm"  # has PyTorch 1.13, the last with this file in its source package
SOURCE = "binaries/speed_benchmark_torch.cc"
WHEEL = "torch==2.8.0"
PYTHON = "3.13"
COMPILER = "aarch64-linux-gnu-g++"
ON_PHONE = "/opt/torch/torch/lib"
NEEDED = ["apt-get", "tar", COMPILER]


def for_phone() -> Path:
    """A folder that is the phone's /opt/torch: bin/speed_benchmark_torch and what it links to."""
    return cache.kept("speed_benchmark-arm64", _build_for_phone, sys.modules[__name__])


def _source() -> Path:
    def fetch(out: Path) -> None:
        with tempfile.TemporaryDirectory(dir=out.parent) as work:
            apt = debian.Debian(Path(work) / "apt", RELEASE, "amd64")
            apt.original("pytorch", SOURCE, out)

    return cache.kept("speed_benchmark-source", fetch, SOURCE) / Path(SOURCE).name


def _build_for_phone(out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work]
        command += ["--only-binary", ":all:", "--platform", "manylinux_2_28_aarch64"]
        command += ["--python-version", PYTHON, WHEEL]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work)
        (out / "bin").mkdir()
        program = out / "bin/speed_benchmark_torch"
        _compile(_source(), Path(work) / "torch", program)
        (out / "torch").mkdir()
        (Path(work) / "torch/lib").rename(out / "torch/lib")
        (Path(work) / "torch.libs").rename(out / "torch.libs")


def _compile(source: Path, torch: Path, program: Path) -> None:
    command = [COMPILER, "-std=c++20", "-O2", "-w", "-DBUILD_LITE_INTERPRETER=1"]
    command += [
        f"-I{torch}/include",
        f"-I{torch}/include/torch/csrc/api/include",
        str(source),
        "-o",
        str(program),
    ]
    command += [f"-L{torch}/lib", "-Wl,--allow-shlib-undefined", "-Wl,--no-as-needed"]
    command += ["-ltorch_cpu", "-lc10", f"-Wl,-rpath,{ON_PHONE}", "-pthread"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}: {ran.stderr[-2000:]}")
