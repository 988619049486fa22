"""What the README, the docs and the examples tell people to type is understood."""

import re
import runpy
import shlex
from importlib import import_module
from pathlib import Path

import click
import pytest

from torchfuse.cli import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A line of a code block, and those after it that belong to it; not what a command printed.
LINE = re.compile(r"^(?:\$ )?(torchfuse (?:.*\\\n)*.*)$", re.MULTILINE)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def commands() -> list[str]:
    found = [
        command
        for page in PAGES
        for language, block in BLOCK.findall(page.read_text())
        if not language
        for command in LINE.findall(block)
    ]
    return sorted(set(found))


def test_there_are_commands_of_every_kind_to_check() -> None:
    shown = {shlex.split(command)[1] for command in commands()}
    assert shown >= {"plan", "fuse", "quantize", "compare", "report", "info", "bench", "devices"}


@pytest.mark.parametrize("command", commands())
def test_a_command_in_the_docs_is_understood(command: str) -> None:
    _, name, *words = shlex.split(command.replace("\\\n", " "), comments=True)
    found = cli.get_command(click.Context(cli), name)
    assert found is not None, f"no command {name}"
    found.make_context(name, words)  # raises on an option that is not there


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_leads_to_a_file(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_name_of_torchfuse_in_the_docs_is_public() -> None:
    public = import_module("torchfuse").__all__
    for page in PAGES:
        for name in re.findall(r"\btorchfuse\.(\w+)\(", page.read_text()):
            assert name in public, f"{page.name}: torchfuse.{name}"


def test_the_first_example_fuses_one_pair_and_says_why_not_the_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    runpy.run_path(str(ROOT / "examples" / "first.py"))
    printed = capsys.readouterr().out
    assert "Net: 1 fused, 1 not fused" in printed
    assert "is also read by another use: add." in printed
    assert printed.endswith("equivalent\n")
    assert (ROOT / "examples" / "first.py").read_text() in PAGES[0].read_text()
