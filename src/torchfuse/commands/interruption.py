"""What a long command does when it is told to end: it saves what there is, and says so."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from torchfuse.errors import ArtifactError

__all__ = ["saving_what_there_is"]

_STATUS = 130  # of a program that Ctrl-C ended
_LIKE_CTRL_C = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def saving_what_there_is(save: Callable[[], None], json_path: Path | None) -> Iterator[None]:
    """Save when the block ends early; on Ctrl-C, SIGTERM or SIGHUP end with one line.

    Those two are what a CI job and a closed terminal send: without this, the command would be gone
    before it could tell a device to stop.
    """
    before = {number: signal.getsignal(number) for number in _LIKE_CTRL_C}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:  # under nohup it is to be ignored
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        save()
        kept = "" if json_path is None else f"; the rounds until then are in '{json_path}'"
        advice = "" if json_path is None else ", and --resume goes on with them"
        click.echo(f"torchfuse: interrupted{kept}{advice}.", err=True)
        raise SystemExit(_STATUS) from None
    except BaseException:
        with contextlib.suppress(ArtifactError):  # what ended the block is the news
            save()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
