"""The result of a suite: plain data, no torch, no Dask."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchfuse import serialization
from torchfuse.comparing.comparison import Comparison  # noqa: TC001  # msgspec reads annotations

__all__ = ["Failure", "Result", "SuiteResult"]

_FORMAT = "torchfuse-suite-1"


@dataclass(frozen=True)
class Failure:
    """What could not be done of a comparison."""

    what: str  # "making its files", "timing on adb"
    reason: str  # a sentence


@dataclass(frozen=True)
class Result:
    """What came of one model on one kind of data."""

    name: str
    model: str
    source: str  # as MODEL of the command line
    data: str | None  # its name in the suite
    settings: str  # a digest of all that was asked for but the devices
    devices: tuple[str, ...]  # that were asked for
    comparison: Comparison | None = None  # None: no device is done
    machines: dict[str, str] = field(default_factory=dict)  # by device, where it was measured
    failures: tuple[Failure, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether all that was asked for is there."""
        return not self.failures and set(self.machines) == set(self.devices)


@dataclass(frozen=True)
class SuiteResult:
    """The results of a suite, in the order of its file."""

    results: tuple[Result, ...]
    versions: dict[str, str] = field(default_factory=dict)  # by package, the same on all machines
    machines: dict[str, int] = field(default_factory=dict)  # workers of each
    refused: tuple[str, ...] = ()  # workers, each with why: sentences
    command: str | None = None  # that makes it again, in a shell
    took_s: float | None = None
    unfinished: bool = False  # it was interrupted

    def find(self, name: str) -> Result | None:
        """Return the result of that name, if there is one."""
        return next((result for result in self.results if result.name == name), None)

    def __str__(self) -> str:
        """What `torchfuse compare --suite` prints: the best of each model, and what failed."""
        from torchfuse.render.suite_text import text

        return text(self)

    def to_markdown(self) -> str:
        """The same as Markdown."""
        from torchfuse.render.suite_text import markdown

        return markdown(self)

    def to_html(self) -> str:
        """The report: one HTML file that needs no network.

        Raises:
            UnsupportedError: what makes it is not installed: torchfuse[report].
        """
        from torchfuse.render.html.suite_page import page

        return page(self)

    def to_json(self) -> str:
        """The result as JSON text, with every sample; `from_json` gives back an equal one."""
        return serialization.to_json(self, _FORMAT)

    @classmethod
    def from_json(cls, text: str) -> SuiteResult:
        """The result that `to_json` wrote.

        Raises:
            InputError: it did not write this text.
        """
        return serialization.from_json(cls, text, _FORMAT)
