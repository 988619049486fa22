"""The command `torchfuse bench`: how fast model files run on this machine."""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchfuse.errors import InputError
from torchfuse.speed_benchmark import FLAGS, Options

if TYPE_CHECKING:
    from torchfuse.timing import Measurement

_RUNS = 50
_SAVE_AND_SHOW_EVERY_S = 0.5  # between rounds; more often would disturb what is measured


def _same_flags_as_the_tool(function: Callable[..., None]) -> Callable[..., None]:
    for flag in reversed(FLAGS):
        is_bool = isinstance(flag.default, bool)
        function = click.option(
            f"--{flag.name}",
            type=type(flag.default),
            metavar="true|false" if is_bool else None,
            help=flag.help,
        )(function)
    return function


@click.command("bench", short_help="How fast model files run on this machine.")
@click.argument("artifacts", nargs=-1, metavar="[ARTIFACT]...")
@_same_flags_as_the_tool
@click.option("--threads", type=int, help="Threads that the models run on.")
@click.option("--json", "json_path", metavar="FILE", help="Save every sample and ratio there.")
def command(
    artifacts: tuple[str, ...], threads: int | None, json_path: str | None, **flags: Any
) -> None:
    """Measure how long one call of each ARTIFACT (.pt, .ptl, .pte) takes.

    \b
      torchfuse bench plain.pt fused.pt model.pte --input_dims=1,3,224,224

    Artifacts are compared in one process, in rounds in random order, on one thread, after a
    warm-up until the times have settled; 50 runs unless --iter says otherwise. The inputs are
    tensors of ones, of type float and contiguous unless said otherwise.

    \b
      torchfuse bench --model=model.pte --input_dims=1,3,224,224 --input_type=float

    With --model instead, this is PyTorch's speed_benchmark_torch: its flags, its defaults
    (--warmup=0, --iter=10, threads as they are) and its output.
    """  # noqa: D301  # \b keeps click from re-filling the next paragraph
    given = {name: value for name, value in flags.items() if value is not None}
    if bool(artifacts) == ("model" in given):
        raise InputError(
            "Expected either ARTIFACT names or --model, got "
            f"{'both' if artifacts else 'neither'}; 'torchfuse bench --help' shows both."
        )
    if artifacts:
        _compare(artifacts, given, 1 if threads is None else threads, json_path)
    else:
        _as_the_tool(Options(**given), threads, json_path)


def _as_the_tool(options: Options, threads: int | None, json_path: str | None) -> None:
    import torch

    from torchfuse import speed_benchmark
    from torchfuse.timing import Measurement, pinned_threads

    report = _Report(json_path, options.input_dims)
    with contextlib.nullcontext() if threads is None else pinned_threads(threads):
        samples_s = speed_benchmark.run(options)
        count = torch.get_num_threads()
    report.save([Measurement(options.model, samples_s, options.warmup, None, count)])


def _compare(
    artifacts: Sequence[str], given: dict[str, Any], threads: int, json_path: str | None
) -> None:
    from torchfuse.render.bench import block, closing
    from torchfuse.speed_benchmark import model_errors_in_one_line, observer_line, print_value
    from torchfuse.timing import measure_interleaved

    options = Options(**_with_own_defaults(given))
    paths = _distinct(artifacts)
    calls: dict[str, Callable[[], Any]] = {}
    for name, path in paths.items():
        with model_errors_in_one_line(path):
            calls[name], output = _loaded(path, options)
        _refuse_nan(path, output)
        if options.print_output:
            click.echo(f"{name} returned")
            print_value(output, sys.stdout)
    report = _Report(json_path, options.input_dims)
    with _Progress() as progress:
        measured = measure_interleaved(
            calls,
            (),
            warmup=given.get("warmup"),
            runs=options.iter,
            threads=threads,
            on_round=progress.show,
            on_partial=report.save_now_and_then,
        )
    report.save(list(measured.values()))
    for name, measurement in measured.items():
        if options.report_pep:
            for sample_s in measurement.samples_s:
                click.echo(observer_line(round(sample_s * 1e9)))
        click.echo(block(measurement) + "\n")
        for caution in measurement.cautions:
            click.echo(f"Warning: {name}: {caution}.", err=True)
    if len(measured) > 1:
        click.echo(closing(list(measured.values())))


def _with_own_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Return the flags, with one type and format per tensor where they can be left out."""
    if given.get("vulkan"):
        # The tool's own sentence is about its flag; here a device would be the way to a GPU.
        raise InputError("This machine's runtimes have no Vulkan; leave out --vulkan.")
    needs_none = given.get("no_inputs") or given.get("use_bundled_input", -1) >= 0
    if not (needs_none or given.get("input_dims") or given.get("pytext_len")):
        raise InputError(
            "--input_dims is missing; give the shape of the input, such as "
            "--input_dims=1,3,224,224, or --no_inputs=true."
        )
    count = len([dims for dims in given.get("input_dims", "").split(";") if dims])
    completed = {"iter": _RUNS, **given}
    for name, default in (("input_type", "float"), ("input_memory_format", "contiguous_format")):
        entries = completed.get(name, default)
        completed[name] = ";".join([entries] * count) if ";" not in entries else entries
    return completed


def _distinct(artifacts: Sequence[str]) -> dict[str, str]:
    """Return name → path; a path given again is measured again, under a name of its own."""
    names: dict[str, str] = {}
    for path in artifacts:
        name, again = path, 2
        while name in names:
            name, again = f"{path} ({again})", again + 1
        names[name] = path
    return names


def _loaded(path: str, options: Options) -> tuple[Callable[[], Any], Any]:
    import torch

    from torchfuse.exporting import load
    from torchfuse.speed_benchmark import bundled_input, create_inputs

    model = load(path)
    inputs = create_inputs(options)
    if options.use_bundled_input >= 0:
        inputs = bundled_input(model, options.use_bundled_input)

    def call() -> Any:
        return model(*inputs)

    with torch.inference_mode():
        return call, call()


def _refuse_nan(path: str, output: Any) -> None:
    import torch
    from torch.utils import _pytree as pytree

    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.isnan().any():
            raise InputError(
                f"The model in '{path}' returns NaN for these inputs, so its time says nothing "
                "about real ones; repair the model, or give a bundled input that it was made for."
            )


class _Report:
    """The JSON file of a run: known to be writable before measuring, whole at any moment."""

    def __init__(self, path: str | None, inputs: str) -> None:
        self._path = None if path is None else Path(path)
        self._inputs = inputs
        self._saved_at_s = time.monotonic()
        if self._path is not None and self._path.is_file():
            # What an earlier run left stays until this one has something to put in its place.
            self._write(self._path, self._path.read_bytes())
        else:
            self.save([])

    def save_now_and_then(self, so_far: "dict[str, Measurement]") -> None:
        if time.monotonic() - self._saved_at_s >= _SAVE_AND_SHOW_EVERY_S:
            self.save(list(so_far.values()))

    def save(self, measured: "Sequence[Measurement]") -> None:
        if self._path is None:
            return
        from torchfuse.machine import this_machine
        from torchfuse.render.bench import to_json

        versions = {name: version(name) for name in ("torch", "executorch")}
        text = to_json(measured, this_machine(), versions=versions, inputs=self._inputs)
        self._write(self._path, text.encode())
        self._saved_at_s = time.monotonic()

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        from torchfuse.artifacts import write_atomically

        write_atomically(path, data)


class _Progress:
    """A bar on stderr that moves between rounds, never during one."""

    def __enter__(self) -> "_Progress":
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._bar = Progress(
            console=console,
            auto_refresh=False,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("measuring", total=None)
        self._shown_at_s = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, done: int, rounds: int) -> None:
        if time.monotonic() - self._shown_at_s >= _SAVE_AND_SHOW_EVERY_S:
            self._bar.update(self._task, completed=done, total=rounds, refresh=True)
            self._shown_at_s = time.monotonic()
