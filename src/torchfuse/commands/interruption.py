"""What a long command does when it is told to end: it saves what there is, and says so."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from torchfuse.commands.status import INTERRUPTED
from torchfuse.errors import ArtifactError

__all__ = ["saving_what_there_is"]

_LIKE_CTRL_C = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def saving_what_there_is(
    save: Callable[[], object],
    json_path: Path | None,
    what: str = "the rounds until then are",
) -> Iterator[None]:
    """Save when the block ends early; on Ctrl-C, SIGTERM or SIGHUP end with one line.

    `save` returns False where there is nothing yet; `what` is said to be in the file.

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
        is_saved = save() is not False and json_path is not None
        kept = f"; {what} in '{json_path}'" if is_saved else ""
        advice = ", and --resume goes on with them" if is_saved else ""
        click.echo(f"torchfuse: interrupted{kept}{advice}.", err=True)
        raise SystemExit(INTERRUPTED) from None
    except BaseException:
        with contextlib.suppress(ArtifactError):  # what ended the block is the news
            save()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
