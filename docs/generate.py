"""Fills in every block of the README and the docs that shows the output of a command.

A block is a comment and the fenced text after it:

    <!-- output of: torchfuse recipe --out out; from: variant -->
    ```text
    …
    ```

`from` (optional) leaves out what comes before the first line that begins with that word. Run with
`python docs/generate.py [WORD]` in a checkout with the commands installed; with a WORD, only the
blocks whose command contains it are run.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"(?P<comment><!-- output of: (?P<command>[^;\n]+?)(?:; from: (?P<start>\S+))? -->\n```\w*\n)"
    r".*?(?P<end>^```$)",
    re.DOTALL | re.MULTILINE,
)


def output_of(command: str, start: str | None) -> str:
    """Return what `command` prints on stdout, from the line that begins with `start`."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    # A benchmark that misses its target ends with status 1, and prints so: that is shown too.
    run = subprocess.run(
        shlex.split(command), cwd=ROOT, env=environment, check=False, stdout=subprocess.PIPE
    )
    if not run.stdout:
        sys.exit(f"'{command}' printed nothing and ended with status {run.returncode}")
    lines = [line.rstrip() for line in run.stdout.decode().splitlines()]
    if start is not None:
        lines = lines[next(i for i, line in enumerate(lines) if line.startswith(start)) :]
    return "\n".join(lines).strip("\n") + "\n"


def main(word: str) -> None:
    """Rewrite the blocks whose command contains `word`."""
    (ROOT / "out").mkdir(exist_ok=True)  # what the commands write goes there
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:

        def filled(match: re.Match[str]) -> str:
            if word not in match["command"]:
                return match[0]
            print(f"{path.name}: {match['command']}", file=sys.stderr)  # noqa: B023  # used at once
            return match["comment"] + output_of(match["command"], match["start"]) + match["end"]

        text = path.read_text()
        path.write_text(BLOCK.sub(filled, text))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
