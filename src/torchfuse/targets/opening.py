"""Reading a model file: its bytes, once they are known to be whole."""

import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path

from torchfuse.errors import ArtifactError, first_line
from torchfuse.runner.interpreter import command_for, environment
from torchfuse.targets import target_for
from torchfuse.targets.sealing import check_form, damaged
from torchfuse.targets.target import CheckedFile, Target

__all__ = ["check", "first_load"]

_PROGRAM, _COMPILED = ".pt2", ".aoti.pt2"
_WEIGHTS = (".safetensors", ".pth")
_FIRST_LOAD_TIMEOUT_S = 120  # importing torch on a slow disk takes most of it


def check(path: str | os.PathLike[str]) -> CheckedFile:
    """Read a model file and return its bytes, once they are known to be whole.

    A sealed file is compared with its checksum. Any other file has its header and size checked,
    and is then loaded and run for the first time in a child process, because the runtimes end the
    process on some damaged files.

    Raises:
        ArtifactError: missing or unreadable file, unknown suffix, truncated or damaged contents.
        UnsupportedError: the file is whole, and what would load it is not installed.
    """
    path = Path(path)
    if path.name.endswith(_PROGRAM) and not path.name.endswith(_COMPILED):
        raise ArtifactError(
            f"Expected a file that a runtime runs, got '{path}': an exported program is a model, "
            f"and no runtime's file; make one of it ('torchfuse export {path} -o model.pte'; "
            "'torchfuse targets' lists others), or see all of them with 'torchfuse compare'."
        )
    if path.suffix in _WEIGHTS:
        raise ArtifactError(
            f"Expected a file that a runtime runs, got '{path}': a state dict holds weights and no "
            "model; load it into the model that torchfuse.fuse returns, and export that."
        )
    target = target_for(path)
    files = {target.suffix: _read(path, "a model file")}
    for suffix in target.beside:
        beside = path.with_name(path.name.removesuffix(target.suffix) + suffix)
        files[suffix] = _read(beside, f"'{beside.name}' beside '{path}', which is of two files")
    if not files[target.suffix]:
        raise damaged(path, "it is empty")
    metadata = target.unseal(path, files)
    if metadata is not None:
        check_form(path, target.form, metadata)
    else:
        target.check(path, files)
        target.require()
        digest = hashlib.sha256()
        for data in files.values():
            digest.update(data)
        _first_load(target, path, digest.hexdigest())
    data = files.pop(target.suffix)
    return CheckedFile(path, target.form, data, metadata, files)


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"Expected {what}, but '{path}' does not exist.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ArtifactError(f"Expected {what}, but '{path}' cannot be read: {reason}.") from error


@functools.lru_cache(maxsize=64)  # one child per file and contents
def _first_load(target: Target, path: Path, _sha256: str) -> None:
    # A fresh interpreter and not a fork: a fork of a process with torch's threads can hang.
    try:
        child = subprocess.run(  # noqa: S603  # our own interpreter and module, no shell
            command_for("torchfuse.targets.opening", "first_load", str(path.resolve())),
            env=environment(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_FIRST_LOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise damaged(path, f"loading it did not end in {_FIRST_LOAD_TIMEOUT_S} s") from error
    if child.returncode < 0:
        raise damaged(path, f"the runtime dies loading it (signal {-child.returncode})")
    if child.returncode > 0:
        lines = child.stderr.strip().splitlines() or ["no message"]
        raise damaged(
            path,
            f"{target.name} {target.version} refuses it ({lines[-1]}), as it may what was made for "
            "another version",
        )


def first_load(path: str) -> None:
    """Load `path`; what is wrong ends up as the last line of stderr, or as the exit by a signal."""
    try:
        target_for(path).first_load(Path(path))
    except Exception as error:  # noqa: BLE001  # the parent says it
        sys.exit(first_line(error))
