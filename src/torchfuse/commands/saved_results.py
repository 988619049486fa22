"""What `compare` writes and goes on with: a comparison's or a suite's JSON, Markdown and HTML."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click

from torchfuse.artifacts import write_atomically
from torchfuse.commands.status import STDOUT
from torchfuse.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["interrupted_json", "write_results"]


class _Results(Protocol):
    def to_json(self) -> str: ...

    def to_markdown(self) -> str: ...

    def to_html(self) -> str: ...


def write_results(files: Mapping[str, str | None], found: _Results) -> None:
    """Write the results where each option says; '-' prints them, None leaves them out."""
    texts = {
        "--json": lambda: found.to_json() + "\n",
        "--markdown": found.to_markdown,
        "--html": found.to_html,
    }
    for name, at in files.items():
        if at == STDOUT:
            click.echo(texts[name](), nl=False)
        elif at is not None:
            write_atomically(at, texts[name]().encode())


def interrupted_json(json_file: str | None) -> str:
    """Return what --json holds of an interrupted run.

    Raises:
        InputError: there is no such file.
    """
    if json_file is None or json_file == STDOUT or not Path(json_file).is_file():
        raise InputError(
            "--resume goes on with what --json holds; give --json with the file that the "
            "interrupted run saved."
        )
    return Path(json_file).read_text(encoding="utf-8")
