"""`torchfuse report`: what was saved as JSON, as HTML, or what changed between two."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torchfuse.artifacts import check_destination, check_folder, write_atomically
from torchfuse.commands.status import STDOUT
from torchfuse.errors import InputError
from torchfuse.render.libraries import require_libraries
from torchfuse.units import size

if TYPE_CHECKING:
    from torchfuse.comparing.comparison import Comparison
    from torchfuse.suites.results import SuiteResult

__all__ = ["command"]

_TWO = 2


@click.command("report", short_help="The HTML file of a comparison, or what changed between two.")
@click.argument("saved", metavar="FILE.json [NEWER.json]", nargs=-1, required=True)
@click.option(
    "-o", "--output", metavar="OUT",
    help="The HTML file, or, of two, what changed as Markdown; '-' prints it instead.",
)  # fmt: skip
@click.option("--model", metavar="NAME", help="Of a suite: the whole report of this model.")
@click.option(
    "--model-explorer", "folder", type=click.Path(path_type=Path), metavar="DIR",
    help="Write the graph there for Google's Model Explorer, and as its node data the time and the "
    "noise in int8 of each call.",
)  # fmt: skip
def command(
    saved: tuple[str, ...], output: str | None, model: str | None, folder: Path | None
) -> None:
    """Write what `torchfuse compare --json` saved as one HTML file, which needs no network.

    \b
      torchfuse report comparison.json -o report.html
      torchfuse report suite.json --model resnet18 -o resnet18.html
      torchfuse report old.json new.json
      torchfuse report comparison.json --model-explorer graphs/
      model-explorer graphs/graph.json --node_data_paths=graphs/time_ms.json

    Of two files, what became slower, larger or less accurate is printed, by intervals: what may be
    chance is left out.

    FILE.json may be '-': then the JSON is read from the standard input.
    """  # noqa: D301  # \b keeps click from re-filling the next paragraph
    if len(saved) > _TWO:
        raise InputError(f"Expected one file, or an older and a newer one, got {len(saved)}.")
    if output not in (None, STDOUT):
        check_destination(str(output))
    if len(saved) == _TWO:
        if saved[0] == saved[1] == STDOUT:
            raise InputError("Expected two files, got '-' twice.")
        if folder is not None:
            raise InputError("--model-explorer is of one comparison, not for what changed.")
        _changed(_read(saved[0]), _read(saved[1]), output, model)
        return
    if output is None and folder is None:
        raise InputError("Expected -o or --model-explorer, got neither; name what to write.")
    if output is not None:
        require_libraries()
    if folder is not None:
        check_folder(folder)
    found = _chosen(_read(saved[0]), model, saved[0])
    if folder is not None:
        _write_for_model_explorer(found, folder)
    if output is None:
        return
    page = found.to_html()
    if output == STDOUT:
        click.echo(page, nl=False)
        return
    write_atomically(output, page.encode())
    click.echo(f"Wrote {output} ({size(len(page.encode()))}).")


def _write_for_model_explorer(found: "Comparison | SuiteResult", folder: Path) -> None:
    from torchfuse.comparing.comparison import Comparison
    from torchfuse.render.model_explorer import model_explorer_files

    if not isinstance(found, Comparison):
        raise InputError("Model Explorer shows one model; choose it with --model NAME.")
    if not found.before:
        raise InputError(
            f"The comparison of {found.model} has no graph: the model could not be recorded."
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = model_explorer_files(found)
    for name, text in files.items():
        write_atomically(folder / name, text.encode())
    click.echo(f"Wrote {', '.join(str(folder / name) for name in files)}.", err=True)


def _chosen(
    found: "Comparison | SuiteResult", model: str | None, path: str
) -> "Comparison | SuiteResult":
    """Return what the page is to be of."""
    from torchfuse.comparing.comparison import Comparison

    if isinstance(found, Comparison):
        if model is not None:
            raise InputError(f"--model is for suites, and '{path}' is of one model.")
        if not found.rows:
            raise InputError(f"Expected a comparison with rows, got none in '{path}'.")
        return found
    if model is None:
        return found
    result = found.find(model)
    if result is None:
        names = ", ".join(result.name for result in found.results)
        raise InputError(f"'{path}' has no '{model}'; there is {names}.")
    if result.comparison is None:
        raise InputError(f"'{model}' was not measured, so there is nothing to show of it.")
    return result.comparison


def _changed(
    old: "Comparison | SuiteResult",
    new: "Comparison | SuiteResult",
    output: str | None,
    model: str | None,
) -> None:
    from rich.console import Console

    from torchfuse.render.changes_text import markdown, renderable
    from torchfuse.suites.changes import changes

    if model is not None:
        raise InputError("--model is for the report of one suite, not for what changed.")
    found = changes(old, new)
    if output is None:
        console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
        console.print(renderable(found))
    elif output == STDOUT:
        click.echo(markdown(found), nl=False)
    else:
        write_atomically(output, markdown(found).encode())
        click.echo(f"Wrote {output}.")


def _read(path: str) -> "Comparison | SuiteResult":
    from torchfuse.comparing.comparison import Comparison
    from torchfuse.suites.results import SuiteResult

    try:
        text = sys.stdin.read() if path == STDOUT else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"Expected what 'torchfuse compare --json' saved, but '{path}' cannot be read: {error}."
        ) from error
    try:
        plain = json.loads(text)
    except ValueError:  # whoever reads it next says so
        plain = None
    form = plain.get("format") if isinstance(plain, dict) else None
    is_suite = isinstance(form, str) and form.startswith("torchfuse-suite-")
    return SuiteResult.from_json(text) if is_suite else Comparison.from_json(text)
