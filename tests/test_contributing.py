"""A newcomer who does what docs/adding_a_rule.md says, to the letter, has added a rule."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blocks import ROOT, commands

PAGE = (ROOT / "docs" / "adding_a_rule.md").read_text()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what a rule touches and is tested with."""
    without = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("src", "tests", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=without)
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_walk_through_adding_a_rule_can_be_followed_to_the_letter(project: Path) -> None:
    files = re.findall(
        r"`([\w/]+\.py)`[^`]*(?:`fused`[^`]*)?\n\n```python\n(.*?)^```",
        PAGE,
        re.DOTALL | re.MULTILINE,
    )
    assert [Path(name).name for name, _ in files] == ["abs_neg.py", "test_abs_neg.py"]
    for name, text in files:
        assert not (project / name).exists()
        (project / name).write_text(text)
    for text in blocks("diff"):
        subprocess.run(["git", "apply", "-"], input=text, text=True, cwd=project, check=True)
    checks = [words for text in blocks("sh") for words, _ in commands(text)]
    assert [words[0] for words in checks] == ["pytest", "ruff"]
    for words in checks:
        tool = [sys.executable, "-m", *words]
        path = {"PYTHONPATH": str(project / "src")}
        ran = subprocess.run(
            tool, cwd=project, env=os.environ | path, text=True, capture_output=True
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
