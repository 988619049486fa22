"""`torchfuse compare`: one's own model in every form, in one table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torchfuse import model_source
from torchfuse.artifacts import check_destinations, check_folder, write_atomically
from torchfuse.commands.data_options import DataOptions, data_options
from torchfuse.commands.interruption import saving_what_there_is
from torchfuse.commands.model_options import model_options
from torchfuse.errors import InputError

if TYPE_CHECKING:
    from torchfuse.comparison import Comparison

__all__ = ["command"]

_STDOUT = "-"


@click.command("compare", short_help="Your model in every form: how fast, how large, how exact.")
@model_options
@data_options
@click.option(
    "--evaluate", metavar="FILE.py:FUNCTION",
    help="A function that takes what runs the model, inputs to outputs, and returns an accuracy "
    "from 0 to 1.",
)  # fmt: skip
@click.option(
    "--folder", type=click.Path(path_type=Path), metavar="DIR",
    help="Leave the files there. Default: they are deleted.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True,
    help="Threads that the models run on.",
)  # fmt: skip
@click.option(
    "--runs", type=click.IntRange(min=2), default=50, show_default=True, help="Timed runs a row."
)
@click.option(
    "--json", "json_file", metavar="FILE",
    help="Save every sample, ratio and difference there; '-' prints them instead of the table.",
)  # fmt: skip
@click.option(
    "--markdown", "markdown_file", metavar="FILE",
    help="Save the table there as Markdown; '-' prints it instead.",
)  # fmt: skip
def command(
    model: str,
    inputs: tuple[str, ...],
    weights: Path | None,
    given: DataOptions,
    evaluate: str | None,
    folder: Path | None,
    threads: int,
    runs: int,
    json_file: str | None,
    markdown_file: str | None,
) -> None:
    """Make, check and time every form of MODEL on this machine, and say what each step buys.

    MODEL is path/to/file.py:callable or package.module:callable. The forms: eager as it is, in
    channels_last and fused; TorchScript; ExecuTorch in fp32, fp16 and, with --data, int8. All are
    timed in the same rounds, in random order.
    """
    files = {"--json": json_file, "--markdown": markdown_file}
    if json_file == markdown_file == _STDOUT:
        raise InputError("Expected one of --json and --markdown as '-', got both; name a file.")
    check_destinations({name: None if at == _STDOUT else at for name, at in files.items()})
    if folder is not None:
        check_folder(folder)
    given.check()
    loaded = model_source.load(model, inputs, weights)
    if loaded.exported:
        raise InputError(
            "Expected a model, got an exported program, which has no other forms; give "
            "path/to/file.py:callable."
        )
    function = None if evaluate is None else model_source.load_function(evaluate)
    network, example, preprocessing = given.applied(loaded.model, loaded.example_inputs)
    import torchfuse
    from torchfuse.render.progress import progress
    from torchfuse.runner.allocator import keep_freed_memory

    keep_freed_memory()  # some of the variants are measured in this process
    with saving_what_there_is(lambda: None, None), progress() as step:
        comparison = torchfuse.compare(
            network,
            example,
            calibration=given.data,
            preprocessing=preprocessing,
            evaluate=function,
            folder=folder,
            threads=threads,
            runs=runs,
            progress=step,
        )
    texts = {"--json": comparison.to_json() + "\n", "--markdown": comparison.to_markdown()}
    for name, at in files.items():
        if at == _STDOUT:
            click.echo(texts[name], nl=False)
        elif at is not None:
            write_atomically(at, texts[name].encode())
    if _STDOUT not in files.values():
        _show(comparison, folder)


def _show(comparison: Comparison, folder: Path | None) -> None:
    from rich.console import Console

    from torchfuse.render.comparison import caution_lines, renderable

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    console.print(renderable([comparison]))
    if folder is not None:
        console.print(f"\nThe files are in {folder}.", soft_wrap=True)
    for line in caution_lines([comparison]):
        click.echo(line, err=True)
