"""What a long command is doing and how long it took, on stderr: a status line, or a line per step.

A terminal has the status line, with a line left for each step of a second or more; a pipe has a
line when a step begins, and one with its time if that was a second or more.
"""

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator

import click
from rich.console import Console

__all__ = ["is_quiet", "progress", "quiet_option", "suite_progress"]

_WORTH_SAYING_S = 1.0


class _Shown:
    is_quiet = False  # --quiet of the command that runs


def is_quiet() -> bool:
    """Whether --quiet was given."""
    return _Shown.is_quiet


def _set(_ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    _Shown.is_quiet = value


quiet_option = click.option(
    "-q", "--quiet", is_flag=True, expose_value=False, callback=_set,
    help="No progress on stderr.",
)  # fmt: skip


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yield what to call with a description before each step."""
    if _Shown.is_quiet:
        yield lambda _: None
        return
    if sys.stderr.isatty():
        console = Console(stderr=True, markup=False, highlight=False)
        with console.status("starting") as status, _timed(console.print) as begins:

            def update(step: str) -> None:
                begins(step)
                status.update(step)

            yield update
        return

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    with _timed(lambda line: say(f"  {line}")) as begins:

        def line(step: str) -> None:
            if begins(step):
                say(step)

        yield line


@contextlib.contextmanager
def suite_progress() -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Yield what to call when a step begins, of several at once, and with what is worth a line.

    A terminal has both, a pipe the lines.
    """
    if _Shown.is_quiet:
        yield lambda _: None, lambda _: None
    elif sys.stderr.isatty():
        console = Console(stderr=True, markup=False, highlight=False)
        with console.status("starting") as status:
            yield status.update, console.print
    else:
        yield lambda _: None, lambda line: print(line, file=sys.stderr)


@contextlib.contextmanager
def _timed(say: Callable[[str], object]) -> Iterator[Callable[[str], bool]]:
    """Yield what is told of each step, and returns whether it is one of a new kind.

    When a kind of step ends that took long, `say` is given its time.
    """
    last, began_s = "", time.monotonic()

    def end() -> None:
        took_s = time.monotonic() - began_s
        if last and took_s >= _WORTH_SAYING_S:
            say(f"{last}: {took_s:.1f} s")

    def begin(step: str) -> bool:
        nonlocal last, began_s
        kind = re.sub(r",? ?\b\d+ of \d+", "", step)  # "round 3 of 50" once, not fifty times
        if kind == last:
            return False
        end()
        last, began_s = kind, time.monotonic()
        return True

    yield begin
    end()
