"""`torchfuse fuse`: fuse a model, prove that its outputs stayed, and write it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchfuse import model_source
from torchfuse.artifacts import check_destination, write_atomically
from torchfuse.commands.model_options import model_options, rule_option, strict_option
from torchfuse.commands.plan import print_plan
from torchfuse.errors import FusionError, InputError, UnsupportedError
from torchfuse.render.progress import progress, quiet_option

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn
    from torch.export import ExportedProgram

__all__ = ["command"]

_SUFFIXES = (".pt", ".safetensors", ".pt2")


@click.command("fuse", short_help="Fuse, prove that nothing changed, and save.")
@model_options
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="OUT",
    help="Where to write: a state dict (.pt, .safetensors) or an exported program (.pt2).",
)  # fmt: skip
@rule_option
@strict_option
@quiet_option
def command(
    model: str,
    output: Path,
    inputs: tuple[str, ...],
    weights: Path | None,
    rules: tuple[str, ...],
    strict: bool,
) -> None:
    """Fuse MODEL in evaluation mode, check that its outputs stayed, and write it to OUT.

    MODEL is path/to/file.py:callable, package.module:callable, or an exported program file.pt2. A
    state dict is for the fused model: see torchfuse.fuse. An exported program takes inputs of the
    example's sizes.
    """
    if output.suffix not in _SUFFIXES:
        raise InputError(
            f"'{output}' has no suffix that says what to write: use .pt or .safetensors for a "
            "state dict, .pt2 for an exported program."
        )
    check_destination(output)
    import torchfuse

    loaded = model_source.load(model, inputs, weights)
    chosen = rules or None
    with progress() as step:
        step("fusing")
        if loaded.exported:
            result = torchfuse.fuse_exported(loaded.model, rules=chosen)
        else:
            result = torchfuse.fuse(
                loaded.model,
                loaded.example_inputs,
                rules=chosen,
                strict=strict,
                inplace=True,
                keep_originals=False,
            )
    print_plan(result.plan)
    check = result.check
    assert check is not None
    if not check.passed:
        raise FusionError(f"The fused model differs, nothing was written: {check.problems[0]}")
    fused = result.model
    if output.suffix == ".pt2" and not loaded.exported:
        fused = _exported(fused, loaded.example_inputs)
    data = _serialised(fused, output.suffix)
    write_atomically(output, data)
    difference = f"largest relative difference {check.max_rel:.1e}"
    click.echo(f"\nWrote {output} ({len(data):,} bytes), {difference}.")
    if output.suffix != ".pt2":
        click.echo(
            "These are weights, for the model that torchfuse.fuse returns to load; 'torchfuse "
            "export' writes a file that runs."
        )


def _serialised(fused: Any, suffix: str) -> bytes:
    """Return what the file will hold; nothing is on disk yet if this fails."""
    import torch

    if suffix == ".safetensors":
        return _safetensors(_state(fused))
    buffer = io.BytesIO()
    if suffix == ".pt":
        torch.save(_state(fused), buffer)
    else:
        torch.export.save(fused, buffer)
    return buffer.getvalue()


def _state(fused: Any) -> Mapping[str, Tensor]:
    # A module's is a method, an exported program's a property.
    state: Mapping[str, Tensor] = fused.state_dict
    return state() if callable(state) else state


def _exported(model: nn.Module, example_inputs: object) -> ExportedProgram:
    import torch

    from torchfuse.cases import cases

    case = cases(example_inputs)[0]
    try:
        return torch.export.export(model, case.args, dict(case.kwargs), strict=False)
    except Exception as error:
        raise UnsupportedError(
            f"torch.export cannot take this model ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}); write a state dict (.pt) instead of a .pt2."
        ) from error


def _safetensors(state: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    # The format has no shared or strided tensors; a copy of each is neither.
    return save({name: tensor.contiguous().clone() for name, tensor in state.items()})
