"""The tutorial is run from its first block to its last, in an empty folder."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from torchfuse.cli import cli
from torchfuse.comparison import Comparison
from torchfuse.exporting import load

TUTORIAL = Path(__file__).resolve().parent.parent / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_tutorial_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    ran = []
    for language, text in BLOCK.findall(TUTORIAL.read_text()):
        if language == "python":
            name = re.match(r"# (\w+\.py)\n", text)
            assert name is not None, text
            (tmp_path / name[1]).write_text(text)
        elif not language:
            for line in text.splitlines():
                program, *words = shlex.split(line)
                ran.append(line)
                if program == "python":
                    runpy.run_path(words[0])
                elif "--device" not in words:
                    result = CliRunner().invoke(cli, words)
                    assert result.exit_code == 0, (line, result.output, result.exception)
    monkeypatch.delitem(sys.modules, "net", raising=False)
    assert len(ran) == 9
    comparison = Comparison.from_json(Path("report.json").read_text())
    assert comparison.baseline.accuracy.value > 0.8
    assert Path("report.html").stat().st_size > 1_000_000
    # What the Kotlin and C++ lines do: the metadata lies where they look for it.
    data = Path("digits.pte").read_bytes()
    after = len("\nSEALED") + 32
    length = int.from_bytes(data[-after - 4 : -after], "little")
    assert data[-after - 4 - length : -after - 4].startswith(b'{"')
    assert load("digits.pte") is not None
