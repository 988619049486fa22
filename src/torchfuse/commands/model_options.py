"""MODEL and the options that say how to make it, the same for every command that takes one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "input_option",
    "model_options",
    "optional_model_options",
    "rule_option",
    "strict_option",
]


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add MODEL, --input and --weights to a command, in this order of its help."""
    return _with_options(function, required=True)


def optional_model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Do so to a command that takes something else in place of MODEL."""
    return _with_options(function, required=False)


def _with_options(function: Callable[..., Any], *, required: bool) -> Callable[..., Any]:
    options = (
        click.argument("model", required=required),
        input_option("An example input"),
        click.option(
            "--weights", type=click.Path(path_type=Path), metavar="FILE",
            help="A state dict to load first: .pt, .pth or .safetensors.",
        ),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def input_option(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return --input, with what it is of that command."""
    return click.option(
        "--input", "inputs", multiple=True, metavar="[NAME=]SIZES[:DTYPE]",
        help=f"{what}, such as 1x3x224x224 or mask=1x77:bool; repeatable.",
    )  # fmt: skip


rule_option = click.option(
    "--rule", "rules", multiple=True, metavar="RULE", help="Only this rule; repeatable."
)
strict_option = click.option(
    "--strict", is_flag=True,
    help="Skip a fusion wherever another path through the code could not be followed.",
)  # fmt: skip
