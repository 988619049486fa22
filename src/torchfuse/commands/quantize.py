"""`torchfuse quantize`: a model in int8, int4 or fp16 as a file, and what that cost it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchfuse import model_source
from torchfuse.commands.model_options import model_options
from torchfuse.errors import InputError

if TYPE_CHECKING:
    from torchfuse.quantizing.preprocessing import Preprocessing

__all__ = ["command"]

_SCHEMES = ("int8", "int8_dynamic", "int4", "fp16")
_PICTURE_DIMENSIONS = 4
_BACKENDS = ("xnnpack", "qnnpack", "x86", "fbgemm", "onednn")
_STEPS = ("careful_ranges", "equalization", "bias_correction", "rounding")


@click.command("quantize", short_help="int8, int4 or fp16, and what that costs.")
@model_options
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="OUT",
    help="The file to write: .pte, or .pt and .ptl with --backend.",
)  # fmt: skip
@click.option(
    "--backend", type=click.Choice(_BACKENDS), default="xnnpack", show_default=True,
    help="For .pt and .ptl one of torch's own engines: plain int8, stubs put in automatically.",
)  # fmt: skip
@click.option(
    "--data", metavar="PATH",
    help="Calibration data: .npy, .npz, a folder of pictures, or 'random' for a look at speed.",
)  # fmt: skip
@click.option(
    "--scheme", type=click.Choice(_SCHEMES),
    help="Default: int8; int8_dynamic for linear models without data.",
)  # fmt: skip
@click.option(
    "--size",
    metavar="HxW",
    help="Pictures: size in pixels, such as 224x224. Default: the example's.",
)
@click.option("--mean", metavar="R,G,B", help="Pictures: mean on a scale of 0 to 1.")
@click.option("--std", metavar="R,G,B", help="Pictures: standard deviation on that scale.")
@click.option(
    "--layout", type=click.Choice(["NCHW", "NHWC"]), default="NCHW", show_default=True,
    help="Pictures: axes of what the model takes.",
)  # fmt: skip
@click.option(
    "--preprocess-inside", is_flag=True,
    help="Put the normalisation into the file, which then takes uint8 pixels, N×H×W×3.",
)  # fmt: skip
@click.option(
    "--recover", type=click.Choice(_STEPS), multiple=True,
    help="A step that wins accuracy back; repeatable. Default for int8: all.",
)  # fmt: skip
@click.option("--no-recovery", is_flag=True, help="Leave accuracy as plain int8 has it.")
@click.option(
    "--max-drop", type=click.FloatRange(min=0), metavar="POINTS",
    help="Keep layers in float until at most so many points of agreement, top-1 or what "
    "--evaluate returns are lost.",
)  # fmt: skip
@click.option(
    "--labels", type=click.Path(path_type=Path), metavar="FILE",
    help="The class of each calibration sample, an .npy file of integers.",
)  # fmt: skip
@click.option(
    "--evaluate", metavar="FILE.py:FUNCTION",
    help="A function that takes a model and returns a number, of which more is better.",
)  # fmt: skip
@click.option("--explain", is_flag=True, help="Show the layers furthest from float, and why.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), metavar="FILE",
    help="Write the report as JSON.",
)  # fmt: skip
def command(
    model: str,
    inputs: tuple[str, ...],
    weights: Path | None,
    output: Path,
    backend: str,
    data: str | None,
    scheme: str | None,
    size: str | None,
    mean: str | None,
    std: str | None,
    layout: str,
    preprocess_inside: bool,
    recover: tuple[str, ...],
    no_recovery: bool,
    max_drop: float | None,
    labels: Path | None,
    evaluate: str | None,
    explain: bool,
    json_file: Path | None,
) -> None:
    """Quantize MODEL in evaluation mode, check what comes out, and write it to OUT.

    MODEL is path/to/file.py:callable or package.module:callable.
    """
    _check_suffix(output, backend)
    if recover and no_recovery:
        raise InputError("Expected --recover or --no-recovery, got both.")
    loaded = model_source.load(model, inputs, weights)
    if loaded.exported:
        raise InputError(
            "Expected a model, got an exported program: batch norms are folded and ranges measured "
            "on the model itself; give path/to/file.py:callable."
        )
    import torchfuse

    if scheme == "fp16":
        artifact = torchfuse.export(loaded.model, loaded.example_inputs, output, precision="fp16")
        _closing(artifact)
        return
    network, example = loaded.model, loaded.example_inputs
    preprocessing = _preprocessing(size, mean, std, layout, example)
    if preprocess_inside:
        network, example = _with_preprocessing(network, preprocessing)
    static = scheme in (None, "int8") and data is not None and backend == "xnnpack"
    steps = () if no_recovery or not static else (recover or _STEPS)
    result = torchfuse.quantize(
        network,
        example,
        data,
        scheme=scheme,
        backend=backend,
        preprocessing=preprocessing,
        recovery=steps,
        max_drop=max_drop,
        labels=None if labels is None else _labels(labels),
        evaluate=None if evaluate is None else model_source.load_function(evaluate),
        explain=explain,
    )
    if sys.stdout.isatty():
        from rich.console import Console

        from torchfuse.render.quantization import renderable

        Console().print(renderable(result.report))
    else:
        click.echo(str(result.report))
    metadata = None if preprocessing is None else preprocessing.to_dict()
    artifact = torchfuse.export(result.model, example, output, preprocessing=metadata)
    if json_file is not None:
        from torchfuse.artifacts import write_atomically

        delegation = None if artifact.delegation is None else artifact.delegation.to_dict()
        found = {**json.loads(result.report.to_json()), "delegation": delegation}
        write_atomically(json_file, (json.dumps(found, indent=2) + "\n").encode())
    _closing(artifact)


def _check_suffix(output: Path, backend: str) -> None:
    expected = (".pte",) if backend == "xnnpack" else (".pt", ".ptl")
    if output.suffix not in expected:
        advice = " or give --backend" if output.suffix in (".pt", ".ptl") else ""
        raise InputError(
            f"Expected an output that ends in {' or '.join(expected)} for {backend}, got "
            f"'{output}'; choose another name{advice}."
        )


def _closing(artifact: Any) -> None:
    if artifact.delegation is not None:
        click.echo(f"\n{artifact.delegation}")
    click.echo(f"\nWrote {artifact.path} ({artifact.size_bytes:,} bytes).")


def _preprocessing(
    size: str | None, mean: str | None, std: str | None, layout: str, example: Any
) -> Preprocessing | None:
    if size is None and mean is None and std is None:
        return None
    if mean is None or std is None:
        raise InputError("Expected --mean and --std together: each changes the input.")
    from torchfuse.quantizing.preprocessing import Preprocessing

    return Preprocessing(
        size=_size_of(example, layout) if size is None else _parsed_size(size),
        mean=_numbers("--mean", mean),
        std=_numbers("--std", std),
        layout="NCHW" if layout == "NCHW" else "NHWC",
    )


def _parsed_size(text: str) -> tuple[int, int]:
    height, separator, width = text.partition("x")
    if not (separator and height.isdigit() and width.isdigit()):
        raise InputError(f"Expected --size as HxW, such as 224x224, got '{text}'.")
    return int(height), int(width)


def _size_of(example: Any, layout: str) -> tuple[int, int]:
    """The height and width of the example's picture."""
    from torchfuse.inputs import cases

    case = cases(example)[0]
    (picture, *_) = (*case.args, *case.kwargs.values(), None)
    shape = tuple(getattr(picture, "shape", ()))
    if len(shape) != _PICTURE_DIMENSIONS:
        raise InputError("Expected --size, since the example input is no picture to take it from.")
    return shape[2:] if layout == "NCHW" else shape[1:3]


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(
            f"Expected {option} as three numbers such as 0.485,0.456,0.406, got '{text}'."
        ) from error


def _with_preprocessing(network: Any, preprocessing: Preprocessing | None) -> tuple[Any, Any]:
    if preprocessing is None:
        raise InputError("--preprocess-inside needs --mean and --std.")
    import torch

    from torchfuse.quantizing.preprocessing import WithPreprocessing

    pixels = torch.randint(0, 256, (1, *preprocessing.size, 3), dtype=torch.uint8)
    return WithPreprocessing(network, preprocessing), pixels


def _labels(path: Path) -> Any:
    import numpy as np
    import torch

    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"Expected integers in an .npy file as labels, got '{path}': {error}."
        ) from error
