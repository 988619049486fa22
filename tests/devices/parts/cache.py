"""What is built once and kept: outside the source tree, by name and recipe."""

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


def folder() -> Path:
    """Where the parts are kept; it may be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "torchfuse-devices"


def kept(name: str, make: Callable[[Path], None], *recipe: ModuleType | str) -> Path:
    """The folder that `make` has filled, now or some time before.

    `recipe` is what the contents depend on: modules, whose text counts, and texts.
    """
    texts = [part if isinstance(part, str) else _text(part) for part in recipe]
    key = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
    path = folder() / f"{name}-{key}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with (folder() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one builds, the others wait
        if not path.exists():
            start = time.monotonic()
            making = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=folder()))
            try:
                make(making)
                making.chmod(0o755)
                making.rename(path)
            finally:
                shutil.rmtree(making, ignore_errors=True)
            print(f"{name}: built in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return path


def _text(module: ModuleType) -> str:
    return Path(str(module.__file__)).read_text()
