"""What the README and the docs show is run, block by block, in a folder of each page's own.

By the language after the fence:

- `python` is run; where it begins with `# name.py`, it is saved under that name instead.
- `sh` holds commands, which are run; one that is to fail says so: `# status 1`.
- `text` is what the block before it printed.
- `toml` is saved as the name in its first line says.
- `diff` applies to the project as it is.
- `cpp` is compiled with a `main` that prints what `metadata` gives of the page's `digits.pte`.

What cannot be run here is skipped with its reason, in a comment: `<!-- skip: next "…" -->`. What
takes minutes lies between `skip: start if(quick, "…")` and `skip: end`; only docs/generate.py runs
it. In the folder lie the tutorial's files, and `examples`, `benchmarks` and `docs` as in a clone.
"""

import atexit
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from functools import cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser

import torchfuse

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
LANGUAGES = {"python", "sh", "text", "toml", "yaml", "cpp", "kotlin", "diff"}

_NAMED = re.compile(r"# ([\w.]+\.\w+)\n")
_STATUS = re.compile(r"#.*\bstatus (\d+)")
# What differs between two runs or two machines, and what stands in its place for a comparison.
_MASKED = (
    (r"\s+", " "),  # columns are as wide as what is in them, lines end where they are full
    (r"─+", "─"),
    (r"\d+\.\d+×(?: \([\d.]+…[\d.]+\))?|not measurable", "RATIO"),
    (r"made it (?:slower, )?RATIO as fast,?|made no measurable difference", "made it RATIO"),
    (r"[\d.]+ (?:ns|µs|ms|s)\b", "TIME"),
    (r"\d(?:\.\d+)?e[-+]\d+", "DIFFERENCE"),
    (r"[\d.]+ dB", "SQNR"),
    (r"\(95 % interval [\d.]+ … [\d.]+\)", "INTERVAL"),
    (r"[\d.]+ ?%(?: \([\d.]+ ?… ?[\d.]+\))?", "SHARE"),
    (r"[+-]?[\d.]+ points", "POINTS"),
    (r"[\d.]+ per second|per (?:iter|second): [\d.]+", "RATE"),
    (r"after \d+ warm-up", "after warm-up"),
    (r"On local: .*?; measured", "On local; measured"),
    (r"(Accuracy is top-1\.).*?(?= (?:\w+, )?\w+ \.pte: XNNPACK)", r"\1"),  # which answers changed
    (r"operator +delegated.*?runs \d+ of \d+", "runs CALLS of CALLS"),  # by what was kept
    (r"kept|undone", "kept or undone"),
    (r"\d+\.\d+\.\d+(?:\+\w+)?", "VERSION"),
    (r"(RATIO|memory:|file:) [\d.]+ [kM]B", r"\1 SIZE"),
    (r"[\d,]+ bytes\)", "SIZE)"),
)
_CPP = """
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
{}
int main() {{ std::cout << metadata("digits.pte") << std::endl; }}
"""


def masked(text: str) -> str:
    """Return a text that is equal for two runs of one command, if they say the same."""
    for pattern, name in _MASKED:
        text = re.sub(pattern, name, text)
    return text.strip()


def commands(text: str) -> Iterator[tuple[list[str], int]]:
    """Return the words of each command in a block, and the status that it is to end with."""
    for line in text.replace("\\\n", " ").splitlines():
        status = _STATUS.search(line)
        words = shlex.split(line, comments=True)
        if words:
            yield words, int(status[1]) if status else 0


def sybil(
    run: Callable[[list[str], int], str], shown: Callable[[Example, str], str | None]
) -> Sybil:
    """Return what runs pages: commands by `run`, which returns what they print.

    What a block printed goes to `shown` with the `text` block after it; a string that this returns
    is a failure.
    """
    evaluate = PythonEvaluator()

    def python(example: Example) -> None:
        if not _saved(example):
            with redirect_stdout(StringIO()) as out, warnings.catch_warnings():
                # Deprecations are torch's to mend; what is said of a file is no fault of the page.
                for kind in (DeprecationWarning, FutureWarning, torchfuse.ExportWarning):
                    warnings.simplefilter("ignore", kind)
                evaluate(example)
            example.namespace.update(ran=example.parsed, printed=out.getvalue())

    def shell(example: Example) -> None:
        printed = [run(words, status) for words, status in commands(example.parsed)]
        example.namespace.update(ran=example.parsed, printed="".join(printed))

    def text(example: Example) -> str | None:
        lines = example.namespace.pop("printed").splitlines()
        return shown(example, "".join(f"{line.rstrip()}\n" for line in lines).strip("\n") + "\n")

    def toml(example: Example) -> str | None:
        return None if _saved(example) else "begin it with the name of its file"

    def cpp(example: Example) -> None:
        Path("metadata.cc").write_text(_CPP.format(example.parsed))
        subprocess.run(["c++", "-std=c++17", "metadata.cc", "-o", "metadata"], check=True)
        json.loads(subprocess.check_output(["./metadata"]))

    def diff(example: Example) -> None:
        command = ["git", "apply", "--check", "-"]
        subprocess.run(command, input=example.parsed, text=True, cwd=ROOT, check=True)

    evaluators = {
        "python": python,
        "sh": shell,
        "text": text,
        "toml": toml,
        "cpp": cpp,
        "diff": diff,
    }
    return Sybil(
        parsers=[
            *(CodeBlockParser(name, evaluator) for name, evaluator in evaluators.items()),
            *(CodeBlockParser(name, _must_be_skipped) for name in ("kotlin", "yaml")),
            SkipParser(),
        ],
        path=str(ROOT),
        patterns=[str(page.relative_to(ROOT)) for page in PAGES],
        excludes=["docs/reference.md"],  # its blocks are signatures
        setup=_open,
        teardown=lambda namespace: namespace["stack"].close(),
    )


def _must_be_skipped(_: Example) -> str:
    return "no test runs this language: mark it with skip"


def _saved(example: Example) -> bool:
    """Save a block that names a file as that file."""
    name = _NAMED.match(example.parsed)
    if name:
        Path(name[1]).write_text(example.parsed)
    return name is not None


def _open(namespace: dict[str, Any]) -> None:
    """Go to a new folder with what lies in it before a page's first block."""
    stack = ExitStack()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for name in ("examples", "benchmarks", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "out").mkdir()
    shutil.copytree(tutorial(), folder, dirs_exist_ok=True)
    stack.callback(os.chdir, Path.cwd())
    os.chdir(folder)
    stack.enter_context(patch.object(sys, "path", [str(folder), *sys.path]))
    stack.callback(sys.modules.pop, "net", None)
    # One for all pages: what one exported, the next need not.
    stack.enter_context(patch.dict("os.environ", XDG_CACHE_HOME=str(tutorial().parent / "cache")))
    stack.enter_context(patch.dict("os.environ", OMP_NUM_THREADS="1"))  # as in `tutorial`
    namespace.update(stack=stack, quick=True, lacking=lambda name: find_spec(name) is None)


@cache
def tutorial() -> Path:
    """Return a folder with the files that the tutorial begins with, its net trained."""
    kept = tempfile.TemporaryDirectory(prefix="torchfuse-docs-")
    atexit.register(kept.cleanup)
    folder = Path(kept.name) / "tutorial"
    folder.mkdir()
    page = (ROOT / "docs" / "tutorial.md").read_text()
    for text, name in re.findall(
        r"^```python\n(# (\w+\.py)\n.*?)^```", page, re.DOTALL | re.MULTILINE
    ):
        (folder / name).write_text(text)
    colours = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    for index, pixels in enumerate(colours):
        picture = folder / "photos" / ("cat", "dog")[index % 2] / f"{index}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(picture)
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # or each number trains another net
    subprocess.run([sys.executable, "train.py"], cwd=folder, env=one_thread, check=True)
    return folder
