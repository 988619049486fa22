"""`torchfuse report`: the HTML file of a comparison that was saved as JSON."""

import sys
from pathlib import Path

import click

from torchfuse.artifacts import check_destination, write_atomically
from torchfuse.commands.status import STDOUT
from torchfuse.errors import InputError
from torchfuse.render.libraries import require_libraries

__all__ = ["command"]


@click.command("report", short_help="The HTML file of a comparison.")
@click.argument("comparison", metavar="FILE.json")
@click.option(
    "-o", "--output", required=True, metavar="OUT", help="The HTML file; '-' prints it instead."
)
def command(comparison: str, output: str) -> None:
    """Write what `torchfuse compare --json` saved as one HTML file, which needs no network.

    FILE.json may be '-': then the JSON is read from the standard input.
    """
    require_libraries()
    if output != STDOUT:
        check_destination(output)
    from torchfuse.comparison import Comparison

    found = Comparison.from_json(_read(comparison))
    if not found.rows:
        raise InputError(f"Expected a comparison with rows, got none in '{comparison}'.")
    page = found.to_html()
    if output == STDOUT:
        click.echo(page, nl=False)
        return
    write_atomically(output, page.encode())
    click.echo(f"Wrote {output} ({len(page.encode()) / 1e6:.2f} MB).")


def _read(path: str) -> str:
    if path == STDOUT:
        return sys.stdin.read()
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"Expected what 'torchfuse compare --json' saved, but '{path}' cannot be read: {error}."
        ) from error
