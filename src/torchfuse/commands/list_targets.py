"""The command `torchfuse targets`: what a model can be exported to, and whether it is so here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

__all__ = ["TargetFacts", "command", "facts"]


@dataclass(frozen=True)
class TargetFacts:
    """What there is to know of a target on this machine."""

    name: str
    suffixes: tuple[str, ...]  # of its file, and of those beside it
    version: str | None  # of the runtime; None: it is not installed
    install: str | None  # the line that installs what is missing; None: nothing is
    precisions: tuple[str, ...]
    merges: tuple[str, ...]  # what the runtime merges by itself
    dynamic: str  # which sizes a file takes
    obstacle: str | None  # why no file can be made here; None: it can


@click.command("targets", short_help="What a model can be exported to, and run by here.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), metavar="FILE",
    help="Write every fact as JSON.",
)  # fmt: skip
def command(json_path: Path | None) -> None:
    """List what a model can be exported to, by the suffix of the file's name.

    Of each: the installed version or the line that installs it, the precisions, what its runtime
    merges by itself, and whether it makes and runs files on this machine.
    """
    from torchfuse.artifacts import check_destination, write_atomically
    from torchfuse.render.targets_text import listed
    from torchfuse.serialization import plain, to_json

    if json_path is not None:
        check_destination(json_path)
    found = facts()
    click.echo(listed([plain(fact) for fact in found]))
    if json_path is not None:
        write_atomically(json_path, (to_json(found) + "\n").encode())


def facts() -> list[TargetFacts]:
    """Return what there is to know of each target here; no runtime is imported for it."""
    from torchfuse.targets import TARGETS

    return [
        TargetFacts(
            name=target.name,
            suffixes=(target.suffix, *target.beside),
            version=target.version if target.is_installed() else None,
            install=None if target.is_installed() else target.install,
            precisions=target.precisions,
            merges=target.folds,
            dynamic="any"
            if target.takes_any_size
            else "as declared"
            if target.takes_dynamic_shapes
            else "the example's",
            obstacle=target.obstacle(),
        )
        for target in TARGETS
    ]
