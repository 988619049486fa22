"""`torchfuse export`: a model as a file for the phone, as it is, in fp16 or in int8."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchfuse import model_source
from torchfuse.artifacts import artifact_format, check_destination, check_options
from torchfuse.commands.data_options import DataOptions, data_options
from torchfuse.commands.dynamic_sizes import dynamic_shapes, parse_sizes
from torchfuse.commands.model_options import model_options
from torchfuse.errors import ExportWarning, InputError
from torchfuse.render.progress import progress, quiet_option

if TYPE_CHECKING:
    from torchfuse.artifacts import Precision

__all__ = ["command"]


@click.command("export", short_help="A file for the phone, run and compared.")
@model_options
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="OUT",
    help="The file to write: .pte for ExecuTorch, .pt or .ptl for TorchScript.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16", "int8"]),
    help="Default: as the model is. int8 is plain; quantize wins accuracy back.",
)  # fmt: skip
@click.option(
    "--no-optimize", is_flag=True,
    help="Leave out fusing, to compare with: for .pt and .ptl.",
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
    sizes: tuple[str, ...],
    given: DataOptions,
) -> None:
    """Export MODEL in evaluation mode, run what comes out and compare it, and write it to OUT.

    \b
      torchfuse export net.py:build -o not_fused.pt --no-optimize
      torchfuse export net.py:build -o fused.pt
      torchfuse export net.py:build -o model.pte --dynamic 0=1..8
      torchfuse export net.py:build -o int8.pte --precision int8 --data inputs.npy

    MODEL is path/to/file.py:callable or package.module:callable.
    """  # noqa: D301  # \b keeps click from re-filling the next paragraph
    form = artifact_format(output)
    check_destination(output)
    parsed = parse_sizes(sizes)
    check_options(
        form,
        precision,
        calibrated=given.data is not None,
        dynamic=bool(parsed),
        optimize=not no_optimize,
    )
    if precision == "int8" and given.data is None:
        raise InputError("int8 needs --data: the inputs that its ranges are measured on.")
    given.check()
    if model_source.parse_source(model).attribute is None:
        raise InputError(
            f"Expected a model, got the exported program '{model}': a file is made of and compared "
            "with the model itself; give path/to/file.py:callable."
        )
    loaded = model_source.load(model, inputs, weights, given.inputs())
    import torchfuse

    network, example, preprocessing = given.applied(loaded.model, loaded.example_inputs)
    calibration: Any = given.data
    kept: Any = preprocessing
    if given.preprocess_inside:  # what the file says is not what pictures are read by
        kept = given.kept(preprocessing)
        if given.data not in (None, "random"):
            calibration = _cases(given.data, network, example, preprocessing)
    with warnings.catch_warnings(), progress() as step:
        step(f"writing {output.name}")
        warnings.simplefilter("ignore", ExportWarning)  # the artifact's notes say it
        artifact = torchfuse.export(
            network,
            example,
            output,
            precision=precision,
            calibration=calibration,
            dynamic_shapes=dynamic_shapes(parsed, network, example),
            optimize=not no_optimize,
            preprocessing=kept,
        )
    click.echo(f"{artifact}\n\nWrote {artifact.path} ({artifact.size_bytes:,} bytes).")


def _cases(data: Any, network: Any, example: Any, preprocessing: Any) -> Any:
    from torchfuse.inputs import cases
    from torchfuse.quantizing import read_calibration
    from torchfuse.quantizing.static import argument_names

    case, names = cases(example)[0], argument_names(network)
    return read_calibration(data, case, preprocessing, as_pixels=True, names=names).cases
