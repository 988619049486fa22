"""`torchfuse compare`: one's own model in every form, in one table."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torchfuse import model_source
from torchfuse.artifacts import check_destinations, check_folder
from torchfuse.commands.compare_suite import (
    SuiteOptions,
    compare_suite,
    refuse_other_options,
    suite_options,
)
from torchfuse.commands.data_options import DataOptions, data_options
from torchfuse.commands.gate_options import Gates
from torchfuse.commands.interruption import saving_what_there_is
from torchfuse.commands.model_options import optional_model_options
from torchfuse.commands.saved_results import interrupted_json, write_results
from torchfuse.commands.status import STDOUT
from torchfuse.comparing.comparison import LOCAL
from torchfuse.errors import InputError
from torchfuse.render.libraries import require_libraries
from torchfuse.render.progress import progress, quiet_option
from torchfuse.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchfuse.comparing.comparison import Comparison

__all__ = ["command"]

_SAVED_EVERY_S = 10.0


@click.command("compare", short_help="Your model in every form: how fast, how large, how exact.")
@optional_model_options
@data_options
@click.option(
    "--validation", metavar="PATH",
    help="Data that answers are compared on, and accuracy, where it has labels: as --data. "
    "Default: a fourth of --data, which is held out.",
)  # fmt: skip
@click.option(
    "--variants", metavar="LIST",
    help="Of not-fused, fused, fp16, int8, with commas. Default: all.",
)  # fmt: skip
@click.option(
    "--targets", metavar="LIST",
    help=f"Of eager, channels_last, {', '.join(target.form for target in TARGETS)}, with commas. "
    "Default: the first two, and the formats for phones.",
)  # fmt: skip
@click.option(
    "--device", "devices", multiple=True, metavar="NAME",
    help="local, adb, adb:SERIAL or ssh:HOST; repeatable. Default: local.",
)  # fmt: skip
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
    "--fail-if", "conditions", multiple=True, metavar="CONDITION",
    help="End with status 1 if 'pte.int8 latency > 5 ms' or the like; repeatable. Of latency, "
    "size, speedup, difference, sqnr, accuracy, drop, agreement, delegation.",
)  # fmt: skip
@click.option(
    "--baseline", metavar="FILE.json", help="An earlier comparison, for --fail-if-slower."
)
@click.option(
    "--fail-if-slower", "slower_by", metavar="SHARE",
    help="End with status 1 if a row surely takes more time than in --baseline by this: 5%.",
)  # fmt: skip
@click.option(
    "--fail-on-noise", is_flag=True,
    help="End with status 3 where the times cannot be trusted.",
)  # fmt: skip
@quiet_option
@click.option("--resume", is_flag=True, help="Go on with the interrupted run that --json holds.")
@click.option(
    "--no-cache", is_flag=True, help="Make every file anew, and keep none for the next time."
)
@click.option(
    "--json", "json_file", metavar="FILE",
    help="Save every sample, ratio and difference there; '-' prints them instead of the table.",
)  # fmt: skip
@click.option(
    "--html", "html_file", metavar="FILE",
    help="Save the report there: one file with charts and the graph, which needs no network.",
)  # fmt: skip
@click.option(
    "--markdown", "markdown_file", metavar="FILE",
    help="Save the table there as Markdown; '-' prints it instead.",
)  # fmt: skip
@suite_options
def command(
    model: str | None,
    inputs: tuple[str, ...],
    weights: Path | None,
    given: DataOptions,
    validation: str | None,
    variants: str | None,
    targets: str | None,
    devices: tuple[str, ...],
    evaluate: str | None,
    folder: Path | None,
    threads: int,
    runs: int,
    conditions: tuple[str, ...],
    baseline: str | None,
    slower_by: str | None,
    fail_on_noise: bool,
    resume: bool,
    no_cache: bool,
    json_file: str | None,
    html_file: str | None,
    markdown_file: str | None,
    suite: Path | None,
    scheduler: str | None,
    workers: int | None,
    cache: str | None,
) -> None:
    """Make, check and time every form of MODEL, and say what each step buys.

    \b
      torchfuse compare net.py:build --data photos/ --mean … --std …
      torchfuse compare "net.py:build(width=0.5)" --data samples.npz --html report.html
      torchfuse compare timm:resnet18 --variants fused,int8 --targets pte --device adb
      torchfuse compare --suite suite.toml --html report.html

    MODEL is path/to/file.py:callable, package.module:callable, either with arguments in brackets,
    timm:NAME, or an exported program file.pt2. The forms: eager as it is, in channels_last and
    fused; TorchScript; ExecuTorch in fp32, fp16 and, with --data, int8. All are timed in the same
    rounds, in random order.

    --data is an .npy or .npz file, which may have an array "labels"; pictures in a folder for each
    class, or with a labels.csv in it; or a .csv or .txt with a picture and its label in each line.
    """  # noqa: D301  # \b keeps click from re-filling the next paragraph
    files = {"--json": json_file, "--markdown": markdown_file, "--html": html_file}
    if list(files.values()).count(STDOUT) > 1:
        printed = " and ".join(name for name, at in files.items() if at == STDOUT)
        raise InputError(f"Expected one of {printed} as '-', got both; name a file.")
    if html_file is not None:
        require_libraries()
    check_destinations({name: None if at == STDOUT else at for name, at in files.items()})
    if folder is not None:
        check_folder(folder)
    gates = Gates.read(conditions, baseline, slower_by, fail_on_noise=fail_on_noise)
    refuse_other_options()
    if suite is not None:
        asked = SuiteOptions(suite, scheduler, workers, cache, no_cache, resume)
        compare_suite(asked, files, gates, _again())
        return
    if model is None:
        raise click.MissingParameter(
            ctx=click.get_current_context(), param_hint="'MODEL'", param_type="argument"
        )
    earlier = _earlier(json_file) if resume else None
    given.check()
    if validation is not None:
        given.check_data("--validation", validation)
    chosen = _listed("--variants", variants)
    if chosen is not None:
        chosen = [name.replace("-", " ") for name in chosen]
    wanted = _listed("--targets", targets)
    devices = devices or (LOCAL,)
    from torchfuse.comparing.cache import default_folder
    from torchfuse.comparing.variants import check_choices

    check_choices(chosen, wanted, devices)
    loaded = model_source.load(model, inputs, weights, given.inputs())
    function = None if evaluate is None else model_source.load_function(evaluate)
    network, example, preprocessing = given.applied(loaded.module, loaded.example_inputs)
    import torchfuse
    from torchfuse.runner.allocator import keep_freed_memory

    keep_freed_memory()  # some of the variants are measured in this process
    so_far: list[Callable[[], Comparison | None]] = []

    def save() -> bool:
        found = so_far[-1]() if so_far else None
        if found is not None:
            write_results({name: at for name, at in files.items() if at != STDOUT}, found)
        return found is not None

    saved = None if json_file in (None, STDOUT) else Path(str(json_file))
    last_saved_s = time.monotonic()

    def step(text: str) -> None:
        nonlocal last_saved_s
        shown(text)
        # Between two rounds, so that it is no part of what is timed; a crash then costs little.
        if saved is not None and time.monotonic() - last_saved_s > _SAVED_EVERY_S:
            if so_far and (found := so_far[-1]()) is not None:
                write_results({"--json": str(saved)}, found)
            last_saved_s = time.monotonic()

    with saving_what_there_is(save, saved), progress() as shown:
        comparison = torchfuse.compare(
            network,
            example,
            variants=chosen,
            targets=wanted,
            devices=devices,
            data=given.data,
            validation=validation,
            preprocessing=preprocessing,
            evaluate=function,
            folder=folder,
            threads=threads,
            runs=runs,
            cache=None if no_cache else default_folder(),
            earlier=earlier,
            command=_again(),
            name=loaded.title,
            progress=step,
            partial=so_far.append,
        )
    if loaded.doubt is not None:
        comparison = replace(comparison, notes=(loaded.doubt, *comparison.notes))
    write_results(files, comparison)
    if STDOUT not in files.values():
        _show(comparison, folder)
    gates.judge(comparison)


def _earlier(json_file: str | None) -> Comparison:
    """Return what --json holds of an interrupted run."""
    from torchfuse.comparing.comparison import Comparison

    return Comparison.from_json(interrupted_json(json_file))


def _again() -> str:
    """Return the command that was typed, for a shell."""
    return shlex.join(["torchfuse", *sys.argv[1:]])


def _listed(option: str, text: str | None) -> list[str] | None:
    """Return a list of names with commas between them; None: it was not given."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"{option} names nothing; leave it out for all.")
    return names


def _show(comparison: Comparison, folder: Path | None) -> None:
    from rich.console import Console

    from torchfuse.render.comparison_text import caution_lines, renderable

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    console.print(renderable([comparison]))
    if folder is not None:
        console.print(f"\nThe files are in {folder}.", soft_wrap=True)
    for line in caution_lines([comparison]):
        click.echo(line, err=True)
