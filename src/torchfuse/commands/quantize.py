"""`torchfuse quantize`: a model in int8, int4 or fp16 as a file, and what that cost it."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchfuse import model_source
from torchfuse.artifacts import check_destinations, write_atomically
from torchfuse.commands.data_options import DataOptions, data_options
from torchfuse.commands.model_options import model_options
from torchfuse.commands.status import GATE, STDOUT
from torchfuse.errors import ExportWarning, InputError, QuantizationWarning, first_line
from torchfuse.render.progress import progress, quiet_option
from torchfuse.serialization import plain, to_json
from torchfuse.targets import TARGETS, target_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchfuse.artifacts import Artifact
    from torchfuse.quantizing.quantization_report import QuantizationReport

__all__ = ["command"]

_SCHEMES = ("int8", "int8_dynamic", "int4", "fp16")
_BACKENDS = ("xnnpack", "qnnpack", "x86", "fbgemm", "onednn")
_PACKAGES = ("torchfuse", "torch", "executorch", "torchao")
_STEPS = ("careful_ranges", "equalization", "bias_correction", "rounding")


@click.command("quantize", short_help="int8, int4 or fp16, and what that costs.")
@model_options
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="OUT",
    help="The file to write: .pte, .onnx or .xml; .pt or .ptl with --backend.",
)  # fmt: skip
@click.option(
    "--backend", type=click.Choice(_BACKENDS), default="xnnpack", show_default=True,
    help="For .pt and .ptl one of torch's own engines: plain int8, stubs put in automatically.",
)  # fmt: skip
@data_options
@click.option(
    "--scheme", type=click.Choice(_SCHEMES),
    help="Default: int8; int8_dynamic for linear models without data.",
)  # fmt: skip
@click.option(
    "--recover", type=click.Choice(_STEPS), multiple=True,
    help="A step that wins accuracy back; repeatable. Default for int8: all.",
)  # fmt: skip
@click.option("--no-recovery", is_flag=True, help="Leave accuracy as plain int8 has it.")
@click.option(
    "--max-drop", type=click.FloatRange(min=0), metavar="POINTS",
    help="Keep layers in float until at most so many points of agreement, top-1 or what "
    "--evaluate returns are lost; end with status 1 where that is impossible.",
)  # fmt: skip
@click.option(
    "--keep-anyway", is_flag=True,
    help="Write OUT even if --max-drop is not met, which ends with status 1 all the same.",
)  # fmt: skip
@click.option(
    "--labels", type=click.Path(path_type=Path), metavar="FILE",
    help="The class of each calibration sample: integers in an .npy file, or a line each in a .csv "
    "or .txt.",
)  # fmt: skip
@click.option(
    "--evaluate", metavar="FILE.py:FUNCTION",
    help="A function that takes a model and returns a number, of which more is better.",
)  # fmt: skip
@click.option("--explain", is_flag=True, help="Show the layers furthest from float, and why.")
@quiet_option
@click.option(
    "--json", "json_file", metavar="FILE",
    help="Write the report as JSON; '-' prints it instead of the text.",
)  # fmt: skip
def command(
    model: str,
    inputs: tuple[str, ...],
    weights: Path | None,
    output: Path,
    backend: str,
    given: DataOptions,
    scheme: str | None,
    recover: tuple[str, ...],
    no_recovery: bool,
    max_drop: float | None,
    keep_anyway: bool,
    labels: Path | None,
    evaluate: str | None,
    explain: bool,
    json_file: str | None,
) -> None:
    """Quantize MODEL in evaluation mode, check what comes out, and write it to OUT.

    MODEL is path/to/file.py:callable, package.module:callable, timm:NAME, or an exported program
    file.pt2. Labels in --data, as for compare, give top-1.
    """
    _check_suffix(output, backend)
    check_destinations({"-o": output, "--json": None if json_file == STDOUT else json_file})
    if recover and no_recovery:
        raise InputError("Expected --recover or --no-recovery, got both.")
    if no_recovery and max_drop is not None:
        raise InputError(
            "Expected --no-recovery or --max-drop, got both: a drop is avoided by recovery."
        )
    given_labels = None if labels is None else _labels(labels)
    if keep_anyway and max_drop is None:
        raise InputError("--keep-anyway is about --max-drop; give that too, or leave both out.")
    if scheme == "fp16":
        _refuse_with_fp16(
            {
                "--data": given.data is not None,
                "--recover": bool(recover),
                "--max-drop": max_drop is not None,
                "--labels": labels is not None,
                "--evaluate": evaluate is not None,
                "--explain": explain,
                "--json": json_file is not None,
            }
        )
    given.check()
    loaded = model_source.load(model, inputs, weights, given.inputs())
    if loaded.doubt is not None:
        click.echo(f"Note: {loaded.doubt}.", err=True)
    import torchfuse
    from torchfuse.quantizing.calibration import CalibrationData

    network, example, preprocessing = given.applied(loaded.module, loaded.example_inputs)
    metadata = given.kept(preprocessing)
    if scheme == "fp16":
        _closing(
            torchfuse.export(
                network,
                example,
                output,
                precision="fp16",
                random_examples=loaded.random_inputs or given.preprocess_inside,
                preprocessing=metadata,
            )
        )
        return
    static = scheme in (None, "int8") and given.data is not None and backend == "xnnpack"
    steps = () if no_recovery or not static else (recover or _STEPS)
    with warnings.catch_warnings(), progress() as step:
        warnings.simplefilter("ignore", QuantizationWarning)  # the report's notes say it
        step("reading the data")
        data = (
            given.data
            if given_labels is not None or backend != "xnnpack"
            else _with_labels(given.data, network, example, preprocessing, loaded.exported)
        )
        result = torchfuse.quantize(
            network,
            example,
            data,
            scheme=scheme,
            backend=backend,
            preprocessing=preprocessing,
            recovery=steps,
            max_drop=max_drop,
            labels=given_labels,
            evaluate=None if evaluate is None else model_source.load_function(evaluate),
            explain=explain,
            measure=static,
            progress=step,
        )
    if json_file != STDOUT:
        _show(result.report)
    reached = result.report.max_drop
    is_met = reached is None or reached.met
    artifact = None
    if is_met or keep_anyway:
        with warnings.catch_warnings(), progress() as step:
            warnings.simplefilter("ignore", ExportWarning)  # the artifact's notes say it
            step(f"writing {output.name}")
            artifact = torchfuse.export(
                result.model,
                example,
                output,
                # What was read with its labels is not read again.
                data=data
                if isinstance(data, CalibrationData)
                else given.read(network, example, preprocessing),
                random_examples=loaded.random_inputs or given.preprocess_inside,
                preprocessing=metadata,
            )
    if json_file is not None:
        _write_report(json_file, result.report, artifact)
    if artifact is not None and json_file != STDOUT:
        _closing(artifact)
    if reached is not None and not reached.met:
        what = "it was written" if keep_anyway else "nothing was written: --keep-anyway writes it"
        click.echo(
            f"torchfuse: '{output}' was to lose at most {reached.asked:g} points of "
            f"{reached.measure} (--max-drop) and loses {reached.reached:.3g} with every layer in "
            f"float; {what} all the same.",
            err=True,
        )
        sys.exit(GATE)


def _with_labels(
    given: str | None, network: Any, example: Any, preprocessing: Any, one_size: bool
) -> Any:
    """Return --data with the labels that it has; as it was given where there are none.

    With `one_size` it is put into batches as large as the example's.
    """
    if given in (None, "random"):
        return given
    from torchfuse.cases import cases
    from torchfuse.comparing.jobs import check_labels
    from torchfuse.comparing.samples import all_of, read_samples
    from torchfuse.quantizing.preprocessing import WithPreprocessing
    from torchfuse.quantizing.static import argument_names

    case = cases(example)[0]
    samples = read_samples(
        given,
        case,
        preprocessing,
        as_pixels=isinstance(network, WithPreprocessing),
        names=argument_names(network),
    )
    if samples.classes is not None:
        try:
            check_labels(network, samples, case)
        except InputError as error:  # pictures in folders are calibration data all the same
            click.echo(f"Note: accuracy is not measured. {error}", err=True)
            samples = replace(samples, labels=None)
    return given if samples.labels is None and not one_size else all_of(samples, case)


def _show(report: QuantizationReport) -> None:
    if sys.stdout.isatty():
        from rich.console import Console

        from torchfuse.render.quantization import renderable

        Console().print(renderable(report))
    else:
        click.echo(str(report))


def _write_report(path: str, report: QuantizationReport, artifact: Artifact | None) -> None:
    """Write the report as JSON, with what the file's delegate runs, if there is a file."""
    found = {
        **plain(report),
        "delegation": None if artifact is None else artifact.delegation,
        "written": artifact is not None,
        "file": None if artifact is None else str(artifact.path),
        "size_bytes": None if artifact is None else artifact.size_bytes,
        "sha256": None if artifact is None else artifact.sha256,
        "verified_on": None if artifact is None else artifact.verified_on,
        "versions": {name: version(name) for name in _PACKAGES},
    }
    text = to_json(found) + "\n"
    if path == STDOUT:
        click.echo(text, nl=False)
    else:
        write_atomically(path, text.encode())


def _check_suffix(output: Path, backend: str) -> None:
    wanted = "pt2e" if backend == "xnnpack" else "torch.ao"
    target = target_for(output)
    if target.quantized_by != wanted:
        expected = [each.suffix for each in TARGETS if each.quantized_by == wanted]
        advice = " or give --backend" if target.quantized_by == "torch.ao" else ""
        raise InputError(
            f"Expected an output that ends in {' or '.join(expected)} for {backend}, got "
            f"'{output}'; choose another name{advice}."
        )


def _refuse_with_fp16(given: Mapping[str, bool]) -> None:
    for option, is_given in given.items():
        if is_given:
            raise InputError(
                f"{option} is about what quantizing loses, which is not measured for fp16; leave "
                "it out."
            )


def _closing(artifact: Artifact) -> None:
    if artifact.delegation is not None:
        click.echo(f"\n{artifact.delegation}")
    for note in artifact.notes:
        click.echo(f"Note: the file was {note}.")
    click.echo(f"\nWrote {artifact.path} ({artifact.size_bytes:,} bytes).")


def _labels(path: Path) -> Any:
    import numpy as np
    import torch

    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        lines = path.read_text(encoding="utf-8-sig").split()
        return torch.tensor([int(line) for line in lines])
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"Expected integers as labels, in an .npy file or a line each in a .csv or .txt, got "
            f"'{path}': {first_line(error)}."
        ) from error
