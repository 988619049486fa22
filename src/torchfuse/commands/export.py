"""`torchfuse export`: a model as a file for the phone, as it is, in fp16 or in int8."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchfuse import model_source
from torchfuse.artifacts import check_destination
from torchfuse.commands.bench_meanwhile import Progress
from torchfuse.commands.data_options import DataOptions, data_options
from torchfuse.commands.dynamic_sizes import dynamic_shapes, parse_sizes
from torchfuse.commands.model_options import model_options
from torchfuse.errors import ExportWarning, InputError
from torchfuse.render.progress import progress, quiet_option
from torchfuse.targets import TARGETS, target_for
from torchfuse.targets.options import check_options

if TYPE_CHECKING:
    from torchfuse.artifacts import Precision

__all__ = ["command"]


@click.command("export", short_help="A file for the phone, run and compared.")
@model_options
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="OUT",
    help="The file to write; its suffix is the target's: see 'torchfuse targets'.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    help="Default: as the model is. int8 is plain; quantize wins accuracy back.",
)  # fmt: skip
@click.option(
    "--no-optimize", is_flag=True,
    help="Leave out fusing, to compare with: for .pt, .ptl, .onnx and .xml.",
)  # fmt: skip
@click.option(
    "--fastest", is_flag=True,
    help="Export to every target installed here, measure them all, and write the fastest: OUT is "
    "a name without a suffix.",
)  # fmt: skip
@click.option(
    "--max-drop", type=click.FloatRange(min=0), metavar="POINTS",
    help="With --fastest: at most so many of 100 samples of --data may get another class.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True,
    help="With --fastest: threads that every runtime is measured on.",
)  # fmt: skip
@click.option(
    "--dynamic", "sizes", multiple=True, metavar="[NAME:]AXIS[,…]=MIN..MAX",
    help="A size that may differ, for .pte: 0=1..8 is axis 0 of every input, x:2=64..512 one of "
    "x, a:1,b:1=1..77 two that are always the same; repeatable.",
)  # fmt: skip
@data_options
@quiet_option
def command(
    model: str,
    inputs: tuple[str, ...],
    weights: Path | None,
    output: Path,
    precision: Precision | None,
    no_optimize: bool,
    fastest: bool,
    max_drop: float | None,
    threads: int,
    sizes: tuple[str, ...],
    given: DataOptions,
) -> None:
    """Export MODEL in evaluation mode, run what comes out and compare it, and write it to OUT.

    \b
      torchfuse export net.py:build -o not_fused.pt --no-optimize
      torchfuse export net.py:build -o fused.pt
      torchfuse export net.py:build -o model.pte --dynamic 0=1..8
      torchfuse export net.py:build -o int8.onnx --precision int8 --data inputs.npy
      torchfuse export net.py:build -o model --fastest

    MODEL is path/to/file.py:callable, package.module:callable, timm:NAME, or an exported program
    file.pt2.
    """  # noqa: D301  # \b keeps click from re-filling the next paragraph
    parsed = parse_sizes(sizes)
    if fastest:
        _check_fastest(output, no_optimize, max_drop, given.data)
    elif max_drop is not None:
        raise InputError(
            "--max-drop goes with --fastest here; 'torchfuse quantize' has it for one file."
        )
    else:
        check_destination(output)
        check_options(
            target_for(output),
            precision,
            calibrated=precision == "int8",
            dynamic=bool(parsed),
            optimize=not no_optimize,
        )
    if precision == "int8" and given.data is None:
        raise InputError("int8 needs --data: the inputs that its ranges are measured on.")
    given.check()
    loaded = model_source.load(model, inputs, weights, given.inputs())
    import torchfuse

    network, example, preprocessing = given.applied(loaded.module, loaded.example_inputs)
    data = given.read(network, example, preprocessing)
    # What the file says is not always what pictures are read by.
    kept: Any = given.kept(preprocessing) if given.preprocess_inside else preprocessing
    is_noise = loaded.random_inputs or given.preprocess_inside
    if fastest:
        with Progress() as shown:
            found = torchfuse.export_fastest(
                network,
                example,
                output,
                precision=precision,
                calibration=data,
                random_examples=is_noise,
                dynamic_shapes=dynamic_shapes(parsed, network, example),
                max_drop=max_drop,
                preprocessing=kept,
                threads=threads,
                progress=functools.partial(shown.show, "local"),
            )
        click.echo(f"{found}\n\nWrote {found.artifact.path} ({found.artifact.size_bytes:,} bytes).")
        return
    with warnings.catch_warnings(), progress() as step:
        step(f"writing {output.name}")
        warnings.simplefilter("ignore", ExportWarning)  # the artifact's notes say it
        artifact = torchfuse.export(
            network,
            example,
            output,
            precision=precision,
            calibration=data if precision == "int8" else None,
            data=None if precision == "int8" else data,
            random_examples=is_noise,
            dynamic_shapes=dynamic_shapes(parsed, network, example),
            optimize=not no_optimize,
            preprocessing=kept,
        )
    click.echo(f"{artifact}\n\nWrote {artifact.path} ({artifact.size_bytes:,} bytes).")


def _check_fastest(
    output: Path, no_optimize: bool, max_drop: float | None, data: str | None
) -> None:
    known = [t.suffix for t in TARGETS if output.name.endswith(t.suffix)]
    if known:
        raise InputError(
            f"--fastest finds out which suffix is best; give '{output}' without '{known[0]}'."
        )
    if no_optimize:
        raise InputError("Expected --fastest or --no-optimize, got both: nothing slower is wanted.")
    if max_drop is not None and data is None:
        raise InputError("--max-drop needs --data: the samples whose classes are compared.")
