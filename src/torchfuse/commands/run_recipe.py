"""`torchfuse recipe`."""

import sys
from pathlib import Path

import click

from torchfuse.artifacts import check_destination, check_folder, write_atomically
from torchfuse.render.progress import progress, quiet_option

__all__ = ["command"]


@click.command("recipe", short_help="PyTorch's recipe, end to end, on this machine.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("out"),
    show_default=True,
    help="Folder for the artifacts and for comparison.json.",
)
@click.option(
    "--runs", type=click.IntRange(min=2), default=30, show_default=True, help="Timed runs a row."
)
@quiet_option
def command(out: Path, runs: int) -> None:
    """Run PyTorch's "Fuse Modules" recipe end to end, on this machine (one to three minutes)."""
    report = out / "comparison.json"
    check_folder(out)
    if out.is_dir():
        check_destination(report)
    from rich.console import Console

    from torchfuse import recipe
    from torchfuse.render import comparison_text as render
    from torchfuse.runner.allocator import keep_freed_memory

    keep_freed_memory()  # some of the variants are measured in this process
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    with progress() as step:
        comparisons = recipe.run(
            out,
            say=lambda text: console.print(text, end="\n\n", soft_wrap=True),
            progress=step,
            runs=runs,
        )
    console.print(render.renderable(comparisons))
    for line in render.caution_lines(comparisons):
        click.echo(line, err=True)
    whole = ",\n".join(comparison.to_json() for comparison in comparisons)
    write_atomically(report, f"[{whole}]\n".encode())
    console.print(f"The artifacts and comparison.json are in {out}.", soft_wrap=True)
