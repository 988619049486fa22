"""Builds the native loops that torchfuse's own measuring loop is compared with.

Both link to what the installed wheels hold, so that both sides run the same kernels:

- `pte_loop`, from pte_loop.cc here, to ExecuTorch's runtime. executorch's wheel has headers, and
  its pybindings export the runtime's symbols; they need libpython, which nothing here runs.
- `speed_benchmark_torch`, from PyTorch's own binaries/speed_benchmark_torch.cc, unmodified, to
  torch's wheel. PyTorch has dropped the file; Debian's source package of PyTorch 1.13 has it. It
  is taken from there with apt, by way of a private list beside the system's, or given.
"""

import importlib.util
import shlex
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Native", "NotBuiltError", "build_pte_loop", "build_speed_benchmark"]

_HERE = Path(__file__).resolve().parent
_TOOL = "binaries/speed_benchmark_torch.cc"
_GIVE = f"give PyTorch 1.13's {_TOOL} with --tool-source"


class NotBuiltError(Exception):
    """A native loop cannot be built here; the text says what to do."""


# Of ExecuTorch's libraries; kernels and backends register themselves when they are loaded.
_PARTS = ("", "_backend_xnnpack", "_kernels_optimized", "_kernels_quantized", "_threadpool")


@dataclass(frozen=True)
class Native:
    """A native loop that was built, and how."""

    path: Path
    command: str  # with $EXECUTORCH, $TORCH and $PYTHON for the folders of what is installed


def build_pte_loop(folder: Path) -> Native:
    """Return pte_loop, built in `folder`, linked to the installed executorch."""
    executorch = _package("executorch")
    include = executorch / "include"
    c10 = include / "executorch/runtime/core/portable_type/c10"
    libraries = [executorch / "lib" / f"libexecutorch{part}.so" for part in _PARTS]
    folders = [executorch / "lib"]
    return _compiled(
        _HERE / "pte_loop.cc",
        folder / "pte_loop",
        ["-DC10_USING_CUSTOM_GENERATED_MACROS", "-isystem", include, "-isystem", c10],
        ["-Wl,--no-as-needed", *libraries, *(f"-Wl,-rpath,{f},-rpath-link,{f}" for f in folders)],
    )


def build_speed_benchmark(folder: Path, source: Path | None) -> Native:
    """Return PyTorch's speed_benchmark_torch, built in `folder`, with the lite interpreter."""
    torch = _package("torch")
    return _compiled(
        source or _tool_of_debian(folder),
        folder / "speed_benchmark_torch",
        [
            "-w",  # its deprecations are not ours
            "-DBUILD_LITE_INTERPRETER=1",
            "-isystem",
            torch / "include",
            "-isystem",
            torch / "include/torch/csrc/api/include",
        ],
        [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"],
    )


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise NotBuiltError(f"{name} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _compiled(source: Path, target: Path, flags: list[object], link: list[object]) -> Native:
    # -O2 and not more: the loop is a few calls, all work is in the wheels' libraries.
    command = ["g++", "-std=c++20", "-O2", *map(str, flags), str(source), "-o", str(target)]
    command += map(str, link)
    stamp = target.with_suffix(".command")  # built already, in the same way and of the same file?
    known = f"{shlex.join(command)}\n{source.read_text()}"
    if not (target.exists() and stamp.exists() and stamp.read_text() == known):
        print(f"building {target.name}", file=sys.stderr)
        _run(
            command,
            "it takes g++ 11 or newer, and the torch and executorch that torchfuse asks for",
        )
        stamp.write_text(known)
    return Native(target, _anywhere(command, source, target))


def _anywhere(command: list[str], source: Path, target: Path) -> str:
    """Return a command as it reads on any machine."""
    text = shlex.join(command)
    for path, name in (
        (_package("executorch"), "$EXECUTORCH"),
        (_package("torch"), "$TORCH"),
        (sysconfig.get_config_var("LIBDIR"), "$PYTHON"),
        (source, source.name),
        (target, target.name),
    ):
        text = text.replace(str(path), name)
    return text


def _tool_of_debian(folder: Path) -> Path:
    """Return the tool's source, out of Debian's source package of PyTorch 1.13."""
    source = folder / "speed_benchmark_torch.cc"
    if source.exists():
        return source
    apt = folder / "apt"
    for part in ("lists/partial", "archives/partial"):
        (apt / part).mkdir(parents=True, exist_ok=True)
    sources = apt / "sources.list"
    sources.write_text("".join(f"{line}\n" for line in _source_lines()))
    private = [
        f"-oDir::Etc::SourceList={sources}",
        "-oDir::Etc::SourceParts=/dev/null",
        f"-oDir::State::Lists={apt / 'lists'}",
        f"-oDir::Cache={apt}",
        "-oAPT::Sandbox::User=root",  # the folder may be one that only its owner can read
    ]
    print("fetching the source of PyTorch 1.13 with apt, 18 MB", file=sys.stderr)
    _run(["apt-get", *private, "update"], _GIVE)
    wanted = ["source", "--download-only", "--tar-only", "pytorch=1.13.1+dfsg-4"]
    _run(["apt-get", *private, *wanted], _GIVE, folder=apt)
    (archive,) = apt.glob("pytorch_*.orig.tar.*")
    with tarfile.open(archive) as tar:
        member = next((m for m in tar if m.name.endswith(_TOOL)), None)
        data = tar.extractfile(member) if member else None
        if data is None:
            raise NotBuiltError(f"{archive} has no {_TOOL}; {_GIVE}")
        source.write_bytes(data.read())
    return source


def _source_lines() -> list[str]:
    """Return lines for apt that name the sources beside the binary packages the system has."""
    fields = ["indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)"]
    listed = _run(["apt-get", *fields, "Identifier: Packages", "Origin: Debian"], _GIVE)
    if not listed.strip():
        raise NotBuiltError(f"apt knows no Debian here; {_GIVE}")
    keys = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    signed = f" [signed-by={keys}]" if keys.exists() else ""
    return sorted({f"deb-src{signed} {line}" for line in listed.splitlines()})


def _run(command: list[str], advice: str, folder: Path | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    except FileNotFoundError as error:
        raise NotBuiltError(f"there is no {command[0]} here; {advice}") from error
    if done.returncode:
        raise NotBuiltError(f"{shlex.join(command)} failed:\n{done.stderr}\n{advice}")
    return done.stdout
