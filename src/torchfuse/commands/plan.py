"""`torchfuse plan`: what can be fused in a model, and why the rest cannot."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click
from rich.console import Console

from torchfuse import model_source
from torchfuse.artifacts import check_destination, write_atomically
from torchfuse.commands.model_options import model_options, rule_option, strict_option
from torchfuse.commands.status import GATE, STDOUT
from torchfuse.errors import InputError
from torchfuse.fusing.worth import TARGETS, worth
from torchfuse.render import plan_text as render

if TYPE_CHECKING:
    from pathlib import Path

    from torchfuse.planning import FusionPlan

__all__ = ["command", "planned", "print_plan"]

_ANY = "any"


@click.command("plan", short_help="What can be fused, and why the rest cannot.")
@model_options
@rule_option
@strict_option
@click.option(
    "--json", "json_file", is_flag=False, flag_value=STDOUT, metavar="[FILE]",
    help="Write the plan as JSON to FILE, or, after MODEL, print it instead of the table.",
)  # fmt: skip
@click.option(
    "--fail-on-skip", "fail_on", multiple=True, metavar="RULE",
    help=f"End with status 1 if RULE left something alone; '{_ANY}' is every rule; repeatable.",
)  # fmt: skip
@click.option(
    "--target", type=click.Choice(sorted(TARGETS)),
    help="Say whether fusing is worth it there: some targets fold batch norms on their own.",
)  # fmt: skip
def command(
    model: str,
    inputs: tuple[str, ...],
    weights: Path | None,
    rules: tuple[str, ...],
    strict: bool,
    json_file: str | None,
    fail_on: tuple[str, ...],
    target: str | None,
) -> None:
    """Print what can be fused in MODEL, and why the rest cannot; nothing is changed.

    MODEL is path/to/file.py:callable, package.module:callable, or an exported program file.pt2. It
    is planned in evaluation mode.
    """
    saved = None if json_file in (None, STDOUT) else json_file
    if saved is not None:
        check_destination(saved)
    _check_rules(fail_on)
    loaded = model_source.load(model, inputs, weights)
    plan = planned(loaded, rules, strict=strict)
    if json_file == STDOUT:
        click.echo(plan.to_json())
    else:
        print_plan(plan)
    if target is not None:  # beside JSON on stdout, it must not be part of it
        click.echo(f"\n{worth(plan, target)}", err=json_file == STDOUT)
    if saved is not None:
        write_atomically(saved, (plan.to_json() + "\n").encode())
    _fail_on_skips(plan, fail_on)


def planned(
    loaded: model_source.LoadedModel, rules: tuple[str, ...], *, strict: bool = False
) -> FusionPlan:
    """Return the plan for a loaded model or exported program."""
    import torchfuse
    from torchfuse.planning import FusionPlan

    if loaded.exported:
        plan = torchfuse.fuse_exported(loaded.model, rules=rules or None, verify=False).plan
    else:
        plan = torchfuse.plan(
            loaded.model, loaded.example_inputs, rules=rules or None, strict=strict
        )
    assert isinstance(plan, FusionPlan)
    return plan


def print_plan(plan: FusionPlan) -> None:
    """Print the table; rows are wrapped on a terminal, and one line each in a pipe or file."""
    if sys.stdout.isatty():
        Console().print(render.renderable(plan))
    else:
        click.echo(render.text(plan))


def _check_rules(names: tuple[str, ...]) -> None:
    from torchfuse.fusing.programs.rewrites import REWRITES
    from torchfuse.rules import RULES

    known = [*(rule.name for rule in RULES), *(rule.name for rule in REWRITES)]
    for name in names:
        if name not in (*known, _ANY):
            raise InputError(
                f"--fail-on-skip '{name}' is no rule; the rules are {', '.join(known)}, "
                f"or '{_ANY}'."
            )


def _fail_on_skips(plan: FusionPlan, fail_on: tuple[str, ...]) -> None:
    left = [skip for skip in plan.skips if skip.rule in fail_on or _ANY in fail_on]
    if left:
        first = f"{' + '.join(left[0].modules)}: {left[0].reason}"
        click.echo(f"torchfuse: {len(left)} skipped, first {first}", err=True)
        sys.exit(GATE)
