"""Fills in every `text` block of the README and the docs with what the block before it prints.

Run with `python docs/generate.py [WORD]` in a checkout with the commands installed. With a WORD,
only pages that have it are looked at, and what takes minutes runs only where its commands have it;
without, only what says something else is replaced. docs/blocks.py says how blocks are run.
docs/reference.md is written anew as well.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import SkipTest

from sybil import Example

from blocks import PAGES, ROOT, masked, sybil
from reference import PAGE, reference


def run(words: list[str], status: int) -> str:
    """Return what a command prints on stdout, or, if nothing, on stderr."""
    print(shlex.join(words), file=sys.stderr)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    # A benchmark that misses its target ends with status 1, and prints so: that is shown too.
    if ran.returncode not in (status, int(words[0] == "python")):
        sys.exit(f"'{shlex.join(words)}' ended with status {ran.returncode}:\n{ran.stderr}")
    return ran.stdout or ran.stderr


def main(word: str) -> None:
    """Rewrite the pages that have `word`."""
    PAGE.write_text(reference())
    for page in PAGES:
        if page == PAGE or word not in page.read_text():
            continue
        edits: list[tuple[int, int, str]] = []

        def keep(example: Example, printed: str) -> None:
            if masked(printed) != masked(example.parsed) or word:
                start = example.document.text.index("\n", example.start) + 1
                edits.append((start, start + len(example.parsed), printed))  # noqa: B023  # at once

        pages = sybil(run, keep)
        document = pages.parse(page)
        pages.setup(document.namespace)
        for example in document:
            # What is slow lies between `skip: start if(quick, …)` and `skip: end`.
            coming = document.text[example.start :].partition("skip: end")[0]
            document.namespace["quick"] = word not in coming
            try:
                example.evaluate()
            except SkipTest as reason:
                print(f"{page.relative_to(ROOT)}:{example.line}: {reason}", file=sys.stderr)
        pages.teardown(document.namespace)
        text = document.text
        for start, end, printed in reversed(edits):
            text = text[:start] + printed + text[end:]
        page.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
