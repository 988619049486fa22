"""What `bench` saves and shows while it measures: between rounds, and not after each."""

import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchfuse.artifacts import check_destinations, write_atomically
from torchfuse.commands.status import STDOUT
from torchfuse.errors import InputError

if TYPE_CHECKING:
    from torchfuse.devices.run import DeviceRun
    from torchfuse.measuring.timing import Measurement

__all__ = ["Progress", "Report"]

_SAVE_AND_SHOW_EVERY_S = 0.5  # more often would disturb what is measured


class Report:
    """The files of a run: known to be writable before any work, whole at any moment.

    Raises:
        ArtifactError: one of them cannot be written.
        InputError: two of them are the same file.
    """

    def __init__(self, paths: Mapping[str, str | None]) -> None:
        given = {form: path for form, path in paths.items() if path is not None}
        printed = [form for form, path in given.items() if path == STDOUT]
        if len(printed) > 1:
            names = " and ".join(f"--{form}" for form in printed)
            raise InputError(f"Expected one of {names} as '-', got both; name a file.")
        self.printed = next(iter(printed), None)  # the form that goes to stdout
        files = {form: path for form, path in given.items() if path != STDOUT}
        check_destinations({f"--{form}": path for form, path in files.items()})
        self._paths = {form: Path(path) for form, path in files.items()}
        self._settings: Mapping[str, Any] = {}
        self._runs: dict[str, DeviceRun] = {}
        self._saved_at_s = time.monotonic()

    @property
    def json_path(self) -> Path | None:
        """Where --resume finds what was measured."""
        return self._paths.get("json")

    def open(
        self, settings: Mapping[str, Any], *, resume: bool = False
    ) -> "dict[str, dict[str, Measurement]]":
        """Find out that the files can be written; return what an earlier run of the same measured.

        Raises:
            InputError: there is nothing to resume, or it was measured otherwise.
            ArtifactError: a file cannot be written.
        """
        self._settings = settings
        earlier = self._earlier() if resume else {}
        for path in self._paths.values():
            # What an earlier run left stays until this one has something to put in its place.
            write_atomically(path, path.read_bytes() if path.is_file() else b"")
        if not all(path.is_file() and path.stat().st_size for path in self._paths.values()):
            self.save()
        return earlier

    def _earlier(self) -> "dict[str, dict[str, Measurement]]":
        from torchfuse.render.bench_files import earlier_runs

        path = self._paths.get("json")
        if path is None or not path.is_file():
            raise InputError(
                "--resume goes on with what --json holds; give --json with the file that the "
                "interrupted run saved."
            )
        try:
            settings, runs = earlier_runs(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"Expected what 'torchfuse bench --json' saved in '{path}', but it is something "
                "else; leave out --resume to measure anew."
            ) from error
        for name, value in {**self._settings, "versions": _versions()}.items():
            if settings.get(name) != value:
                raise InputError(
                    f"The run in '{path}' cannot be gone on with, since its {name} differ: "
                    f"{settings.get(name)!r} then, {value!r} now; leave out --resume to measure "
                    "anew."
                )
        return runs

    def take(self, run: "DeviceRun") -> None:
        """Take in what a device has measured so far; save it now and then."""
        self._runs[run.device.name] = run
        if time.monotonic() - self._saved_at_s >= _SAVE_AND_SHOW_EVERY_S:
            self.save()

    def save(self) -> None:
        """Write the files with all that there is."""
        for form, path in self._paths.items():
            write_atomically(path, self._text(form).encode())
        self._saved_at_s = time.monotonic()

    def print(self) -> None:
        """Print the form that is to go to stdout, if there is one."""
        if self.printed is not None:
            click.echo(self._text(self.printed), nl=False)

    def _text(self, form: str) -> str:
        from torchfuse.render.bench_files import to_csv, to_json, to_markdown

        runs = list(self._runs.values())
        texts = {
            "json": lambda: to_json(runs, versions=_versions(), settings=self._settings),
            "csv": lambda: to_csv(runs),
            "markdown": lambda: to_markdown(runs),
        }
        return texts[form]()


class Progress:
    """What each device is at, on stderr; it moves between rounds, never during one."""

    def __enter__(self) -> "Progress":
        from rich.console import Console
        from rich.live import Live

        from torchfuse.render.progress import is_quiet

        console = Console(stderr=True)
        self._steps: dict[str, str] = {}
        self._shown_at_s = time.monotonic()
        # Without a thread of its own, which would run beside what is measured.
        self._live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._is_shown = console.is_terminal and not is_quiet()
        if self._is_shown:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_shown:
            self._live.stop()

    def show(self, device: str, step: str) -> None:
        """Show what a device is at, beside what the others are at."""
        self._steps[device] = step
        if not self._is_shown or time.monotonic() - self._shown_at_s < _SAVE_AND_SHOW_EVERY_S:
            return
        from rich.text import Text

        self._shown_at_s = time.monotonic()
        steps = "    ".join(f"{name}: {at}" for name, at in self._steps.items())
        self._live.update(Text(steps), refresh=True)  # a host in brackets is no markup


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torchfuse", "torch", "executorch")}
