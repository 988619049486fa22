"""The README, the docs and the examples hold together; conftest.py runs their blocks."""

import re
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest
import yaml

from blocks import LANGUAGES, PAGES, ROOT, commands, masked
from torchfuse.cli import cli

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")


def typed() -> list[tuple[str, ...]]:
    """Every command of ours that a block shows, also where no test can run it."""
    blocks = [block for page in PAGES for block in BLOCK.findall(page.read_text())]
    shown = [text for language, text in blocks if language == "sh"]
    for language, text in blocks:
        if language == "yaml":
            jobs = yaml.safe_load(text)["jobs"].values()
            shown += [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    found = [words for text in shown for words, _ in commands(text)]
    return sorted({tuple(words[1:]) for words in found if words[0] == "torchfuse"})


def test_every_command_is_shown() -> None:
    shown = {words[0] for words in typed()}
    assert shown >= set(cli.list_commands(click.Context(cli))) - {"recipe"}


@pytest.mark.parametrize("words", typed(), ids=" ".join)
def test_a_command_in_the_docs_is_understood(words: tuple[str, ...]) -> None:
    name, *options = words
    found = cli.get_command(click.Context(cli), name)
    assert found is not None, f"no command {name}"
    found.make_context(name, options)  # raises on an option that is not there


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_block_says_its_language_and_so_is_run(page: Path) -> None:
    fences = re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)
    assert set(fences[::2]) <= LANGUAGES
    assert set(fences[1::2]) <= {""}


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_leads_to_a_file_and_a_heading_in_it(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text()):
        leads_to = page.parent / target if target else page
        assert leads_to.exists(), target
        assert not anchor or anchor in anchors(leads_to), f"{target}#{anchor}"


def test_on_pypi_every_link_of_the_readme_leads_to_the_repository() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    text = (ROOT / "README.md").read_text()
    for each in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"], text)
    home = project["project"]["urls"]["Homepage"]
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert f"{home}/raw/main/docs/report.png" in links
    assert f"{home}/blob/main/docs/tutorial.md" in links
    assert all(link.startswith("https://") for link in links), links


def test_every_page_and_every_example_is_in_its_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name
    examples = (ROOT / "examples" / "README.md").read_text()
    for example in (ROOT / "examples").iterdir():
        assert example.name == "README.md" or f"]({example.name})" in examples, example.name


def test_every_name_of_torchfuse_in_the_docs_is_public() -> None:
    public = import_module("torchfuse").__all__
    for page in PAGES:
        for name in re.findall(r"\btorchfuse\.(\w+)\(", page.read_text()):
            assert name in public, f"{page.name}: torchfuse.{name}"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="griffe2md needs Python 3.11")
def test_the_reference_is_what_the_docstrings_say() -> None:
    from reference import PAGE, reference

    assert PAGE.read_text() == reference(), "python docs/generate.py mends it"


@pytest.mark.parametrize(
    ("text", "other"),
    [
        (
            "fused  93.08 µs 10.69 µs 1.42× (1.33…1.56) 25.46 kB",
            "fused 1.2 ms 9 ns not measurable 9 kB",
        ),
        ("made it 1.22× (1.10…1.30) as fast in X", "made no\nmeasurable difference in X"),
        ("max abs 4.77e-07, SQNR 137.4 dB, passed", "max abs 2e-07, SQNR 99 dB, passed"),
    ],
)
def test_figures_of_one_run_are_masked(text: str, other: str) -> None:
    assert masked(text) == masked(other)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("Net: 1 fused, 1 not fused", "Net: 2 fused, 0 not fused"),
        ("conv_bn conv1 + bn1 32 115 kB 14.4 k", "conv_bn conv1 + bn1 32 114 kB 14.4 k"),
        ("forward(1×1×8×8)", "forward(1×1×9×9)"),
        ("SQNR 137.4 dB, passed", "SQNR 137.4 dB, failed"),
        ("runs 7 of 7 operator calls", "runs 6 of 7 operator calls"),
    ],
)
def test_what_is_said_is_not_masked(text: str, other: str) -> None:
    assert masked(text) != masked(other)
