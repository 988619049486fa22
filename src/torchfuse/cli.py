"""The command `torchfuse`: one subcommand per file in `commands`, errors as one line."""

import os
import re
import sys
import warnings
from importlib import import_module

import click

from torchfuse.commands.settings import settings
from torchfuse.commands.status import ERROR, FINE, INTERRUPTED
from torchfuse.errors import TorchfuseError

# Each command's file, in the order of the work, which is the order of --help.
_COMMANDS = {
    "recipe": "run_recipe",
    "info": "info",
    "plan": "plan",
    "fuse": "fuse",
    "quantize": "quantize",
    "export": "export",
    "compare": "compare",
    "report": "report",
    "bench": "bench",
    "devices": "list_devices",
    "targets": "list_targets",
}


class _Lazy(click.Group):
    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command = import_module(f"torchfuse.commands.{_COMMANDS[name]}").command
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="torchfuse")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Find, prove and measure fusions in PyTorch models.

    Options of any command can be kept in torchfuse.toml, or in pyproject.toml under
    [tool.torchfuse.COMMAND].
    """
    group = ctx.command
    assert isinstance(group, click.Group)
    ctx.default_map = settings(
        list(_COMMANDS), lambda name: group.get_command(ctx, name), ctx.invoked_subcommand
    )


def _shown(text: object) -> str:
    """Return the text without what a terminal obeys: a file or a device may have put it there."""
    plain = str(text)
    for pattern, option in _AS_OPTIONS:
        plain = pattern.sub(option, plain)
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in plain)


# What the library says of its arguments, in the words of the command line.
_AS_OPTIONS = (
    (re.compile(r"preprocessing=Preprocessing\([^)]*\)"), "--size, --mean and --std"),
    (re.compile(r"precision='(\w+)'"), r"--precision \1"),
    (re.compile(r"backend='(\w+)'"), r"--backend \1"),
    (re.compile(r"\bmax_drop=?"), "--max-drop "),
)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Say a warning as the commands say their own: in one line, without Python's source line."""
    click.echo(f"Warning: {_shown(str(message)).strip()}", err=True)


def main() -> None:
    """Run the command line; what goes wrong ends it with one line on stderr and its status."""
    warnings.showwarning = _show_warning
    try:
        cli.main(standalone_mode=False)
        sys.exit(FINE)
    except TorchfuseError as error:
        click.echo(f"torchfuse: error: {_shown(error)}", err=True)
        for note in getattr(error, "__notes__", ()):
            click.echo(f"  {_shown(note)}", err=True)
        sys.exit(ERROR)
    except click.ClickException as error:
        error.show()
        sys.exit(ERROR)
    except (click.Abort, KeyboardInterrupt):  # click makes the one of the other
        click.echo("torchfuse: interrupted.", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read it has seen enough: `torchfuse plan … | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # Python flushes it at the end
        sys.exit(FINE)
