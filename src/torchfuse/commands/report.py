"""`torchfuse report`: a comparison that was saved as JSON, as HTML and for Model Explorer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torchfuse.artifacts import check_destination, check_folder, write_atomically
from torchfuse.commands.status import STDOUT
from torchfuse.errors import InputError
from torchfuse.render.libraries import require_libraries

if TYPE_CHECKING:
    from torchfuse.comparison import Comparison

__all__ = ["command"]


@click.command("report", short_help="The HTML file of a comparison.")
@click.argument("comparison", metavar="FILE.json")
@click.option("-o", "--output", metavar="OUT", help="The HTML file; '-' prints it instead.")
@click.option(
    "--model-explorer", "folder", type=click.Path(path_type=Path), metavar="DIR",
    help="Write the graph there for Google's Model Explorer, and as its node data the time and the "
    "noise in int8 of each call.",
)  # fmt: skip
def command(comparison: str, output: str | None, folder: Path | None) -> None:
    """Write what `torchfuse compare --json` saved as one HTML file, which needs no network.

    \b
      torchfuse report c.json -o c.html
      torchfuse report c.json --model-explorer graphs/
      model-explorer graphs/graph.json --node_data_paths=graphs/time_ms.json

    FILE.json may be '-': then the JSON is read from the standard input.
    """  # noqa: D301  # \b keeps click from re-filling the next paragraph
    if output is None and folder is None:
        raise InputError("Expected -o or --model-explorer, got neither; name what to write.")
    if output is not None:
        require_libraries()
    if output not in (None, STDOUT):
        check_destination(str(output))
    if folder is not None:
        check_folder(folder)
    from torchfuse.comparison import Comparison

    found = Comparison.from_json(_read(comparison))
    if not found.rows:
        raise InputError(f"Expected a comparison with rows, got none in '{comparison}'.")
    if folder is not None:
        _write_for_model_explorer(found, folder)
    if output is None:
        return
    page = found.to_html()
    if output == STDOUT:
        click.echo(page, nl=False)
        return
    write_atomically(output, page.encode())
    click.echo(f"Wrote {output} ({len(page.encode()) / 1e6:.2f} MB).")


def _write_for_model_explorer(comparison: Comparison, folder: Path) -> None:
    from torchfuse.render.model_explorer import model_explorer_files

    if not comparison.before:
        raise InputError(
            f"The comparison of {comparison.model} has no graph: the model could not be recorded."
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = model_explorer_files(comparison)
    for name, text in files.items():
        write_atomically(folder / name, text.encode())
    click.echo(f"Wrote {', '.join(str(folder / name) for name in files)}.", err=True)


def _read(path: str) -> str:
    if path == STDOUT:
        return sys.stdin.read()
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"Expected what 'torchfuse compare --json' saved, but '{path}' cannot be read: {error}."
        ) from error
