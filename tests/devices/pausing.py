"""A device's Python that runs torchfuse's runner, and pauses after one of the lines it prints."""

import sys
from pathlib import Path

SCRIPT = """#!{python}
import sys, time
sys.path.insert(0, sys.argv[1])
import torchfuse.runner.__main__ as runner
whole = runner._printed
def printed(line):
    whole(line)
    if {after!r} in line:
        open({reached!r}, "w").close()
        time.sleep(1000)
runner._printed = printed
sys.exit(runner.main(sys.argv[2:]))
"""


def pausing_python(folder: Path, after: str) -> tuple[Path, Path]:
    """The program for --device-python, and the file that is there once it pauses."""
    program, reached = folder / "a python=3", folder / "reached"
    program.write_text(SCRIPT.format(python=sys.executable, after=after, reached=str(reached)))
    program.chmod(0o755)
    return program, reached
