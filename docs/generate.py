"""Fills in every `text` block of the README and the docs with what the block before it prints.

    python docs/generate.py             # all, benchmarks too
    python docs/generate.py --quick     # what the tests compare
    python docs/generate.py WORD        # pages with it, and new figures where a command has it

Run in a checkout with the commands installed. Other blocks are replaced only if they say something
else than their command, figures masked. docs/blocks.py says how blocks are run; docs/reference.md
is written anew as well, and docs/picture.py makes docs/report.png.
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


def main(word: str | None) -> None:
    """Rewrite the pages that have `word`; None: all, but for what takes minutes."""
    PAGE.write_text(reference())
    for page in PAGES:
        if page == PAGE or (word or "") not in page.read_text():
            continue
        edits: list[tuple[int, int, str]] = []

        def keep(example: Example, printed: str) -> None:
            asked = word is not None and word in example.namespace["ran"]
            if asked or masked(printed) != masked(example.parsed):
                start = example.document.text.index("\n", example.start) + 1
                edits.append((start, start + len(example.parsed), printed))  # noqa: B023  # at once

        pages = sybil(run, keep)
        document = pages.parse(page)
        pages.setup(document.namespace)
        for example in document:
            # What is slow lies between `skip: start if(quick, …)` and `skip: end`.
            coming = document.text[example.start :].partition("skip: end")[0]
            document.namespace["quick"] = word is None or word not in coming
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
    arguments = sys.argv[1:]
    main(None if "--quick" in arguments else "".join(arguments))
