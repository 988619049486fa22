"""`torchfuse compare --suite`: many models on many machines, by what a file says."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torchfuse.artifacts import write_atomically
from torchfuse.commands.interruption import saving_what_there_is
from torchfuse.commands.saved_results import interrupted_json, write_results
from torchfuse.commands.status import ERROR, STDOUT
from torchfuse.errors import InputError
from torchfuse.render.progress import suite_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torchfuse.commands.gate_options import Gates
    from torchfuse.suites.results import SuiteResult

__all__ = ["SuiteOptions", "compare_suite", "refuse_other_options", "suite_options"]

_SAVED_SHARE = 0.02  # of the time, at most, in writing what there is so far

# Options of `compare` that a suite has too; what else there is of a model stands in the file.
_SHARED = {
    "suite", "scheduler", "workers", "cache", "resume", "no_cache", "json_file", "html_file",
    "markdown_file", "conditions", "fail_on_noise",
}  # fmt: skip
_ONLY = ("scheduler", "workers", "cache")


@dataclass(frozen=True)
class SuiteOptions:
    """What was given of the options."""

    suite: Path
    scheduler: str | None
    workers: int | None
    cache: str | None
    no_cache: bool
    resume: bool


def suite_options(function: Callable[..., object]) -> Callable[..., object]:
    """Add the options to a command."""
    options = (
        click.option(
            "--suite", type=click.Path(path_type=Path), metavar="FILE.toml",
            help="Compare the models of a suite, in place of MODEL and what it is compared by.",
        ),
        click.option(
            "--scheduler", metavar="ADDRESS",
            help="A suite on a running Dask cluster: tcp://HOST:PORT. Default: one of this "
            "machine's own.",
        ),
        click.option(
            "--workers", type=click.IntRange(min=1), metavar="N",
            help="Worker processes on this machine. Default: as many as cores and memory allow.",
        ),
        click.option(
            "--cache", metavar="PLACE",
            help="Where a suite's files are kept: a folder, or a URL of fsspec's, that all "
            "workers see. Default: as for one model, on this machine alone.",
        ),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def refuse_other_options() -> None:
    """Find out whether options were typed that do not go together with or without --suite.

    Raises:
        InputError: one was.
    """
    context = click.get_current_context()
    typed = [
        parameter
        for parameter in context.command.params
        if parameter.name is not None
        and context.get_parameter_source(parameter.name) is click.core.ParameterSource.COMMANDLINE
    ]
    names = {parameter.name: parameter.opts[0] for parameter in typed}
    if "suite" not in names:
        if wrong := [names[name] for name in _ONLY if name in names]:
            raise InputError(f"{wrong[0]} is for suites; give --suite FILE.toml.")
        return
    wrong = [option for name, option in names.items() if name not in _SHARED | {"quiet"}]
    if wrong:
        what = "MODEL" if wrong[0] == "model" else wrong[0]
        raise InputError(f"{what} is not given with --suite; it belongs in the suite's file.")


def compare_suite(
    given: SuiteOptions, files: Mapping[str, str | None], gates: Gates, command: str
) -> None:
    """Run the suite, and end with its status."""
    from torchfuse.suites.cluster import cluster, require_dask
    from torchfuse.suites.suite_file import read_suite

    require_dask()
    if given.scheduler is not None and given.workers is not None:
        raise InputError("--workers is for this machine; the scheduler has workers of its own.")
    if given.scheduler is not None and given.cache is None:
        raise InputError(
            "--scheduler needs --cache, a folder or a URL that all workers see: the files go from "
            "one machine to another by it."
        )
    earlier = _earlier(files["--json"]) if given.resume else None
    entries = read_suite(given.suite)
    from torchfuse.comparing.cache import default_folder
    from torchfuse.suites.running import Suite
    from torchfuse.suites.store import check_store

    store = given.cache or str(default_folder())
    if "://" not in store:
        store = str(Path(store).resolve())  # a worker runs in another folder
    check_store(store)
    json_file = files["--json"]
    saved = None if json_file in (None, STDOUT) else Path(str(json_file))
    running: list[Suite] = []
    written_s, took_s = time.monotonic(), 0.0

    def save() -> bool:
        found = running[-1].so_far() if running else None
        if found is None or all(result.comparison is None for result in found.results):
            return False
        write_results({name: at for name, at in files.items() if at != STDOUT}, found)
        return True

    def result_came() -> None:
        """Save it, but not so often that a large suite does nothing else."""
        nonlocal written_s, took_s
        began_s = time.monotonic()
        if saved is None or began_s - written_s < took_s / _SAVED_SHARE:
            return
        write_atomically(saved, (running[-1].so_far().to_json() + "\n").encode())
        written_s = time.monotonic()
        took_s = written_s - began_s

    with (
        saving_what_there_is(save, saved, "the results until then are"),
        suite_progress() as (step, line),
    ):
        step("starting workers" if given.scheduler is None else "connecting")
        with cluster(given.scheduler, given.workers) as client:
            if client.dashboard_link and find_spec("bokeh") is not None:
                line(f"Dask's dashboard: {client.dashboard_link}")
            running.append(
                Suite(
                    entries,
                    client,
                    store=store,
                    is_ours=given.scheduler is None,
                    anew=given.no_cache,
                    earlier=earlier,
                    command=command,
                    on_step=step,
                    on_line=line,
                    on_result=result_came,
                )
            )
            found = running[-1].run()
    write_results(files, found)
    if STDOUT not in files.values():
        _show(found)
    failed = sum(len(result.failures) for result in found.results)
    if failed:
        click.echo(f"torchfuse: error: {failed} of the suite's jobs could not be done.", err=True)
        sys.exit(ERROR)
    gates.judge_all({r.name: r.comparison for r in found.results if r.comparison is not None})


def _earlier(json_file: str | None) -> SuiteResult:
    """Return what --json holds of an interrupted run."""
    from torchfuse.suites.results import SuiteResult

    return SuiteResult.from_json(interrupted_json(json_file))


def _show(found: SuiteResult) -> None:
    from rich.console import Console

    from torchfuse.render.suite_text import renderable

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    console.print(renderable(found))
