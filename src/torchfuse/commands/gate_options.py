"""What `compare` is to end with: its gates, read before any work, judged after it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torchfuse.commands.status import GATE, NOISE
from torchfuse.comparing.gates import Condition, failures, parse_condition, parse_share, slower
from torchfuse.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchfuse.comparing.comparison import Comparison

__all__ = ["Gates"]


@dataclass(frozen=True)
class Gates:
    """What was asked for."""

    conditions: tuple[Condition, ...]
    baseline: Comparison | None
    slower_by: float | None  # a share
    fail_on_noise: bool

    @classmethod
    def read(
        cls,
        conditions: tuple[str, ...],
        baseline: str | None,
        slower_by: str | None,
        *,
        fail_on_noise: bool,
    ) -> Gates:
        """Return the gates that the options state.

        Raises:
            InputError: one cannot be read, or needs the other.
        """
        if (baseline is None) != (slower_by is None):
            raise InputError("Expected --baseline and --fail-if-slower together, got one of them.")
        earlier = None
        if baseline is not None:
            from torchfuse.comparing.comparison import Comparison

            try:
                text = Path(baseline).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"The baseline '{baseline}' cannot be read: {error}.") from error
            earlier = Comparison.from_json(text)
        share = None if slower_by is None else parse_share(slower_by)
        return cls(tuple(map(parse_condition, conditions)), earlier, share, fail_on_noise)

    def judge(self, comparison: Comparison) -> None:
        """Say what failed, and end with the status of that; return if nothing did."""
        self.judge_all({"": comparison})

    def judge_all(self, comparisons: Mapping[str, Comparison]) -> None:
        """Do so of several, by their names; "" needs none."""
        failed, noisy = [], 0
        for name, comparison in comparisons.items():
            where = f"{name}: " if name else ""
            found = [text for c in self.conditions for text in failures(c, comparison)]
            if self.baseline is not None and self.slower_by is not None:
                late, doubts = slower(comparison, self.baseline, self.slower_by)
                found += late
                for doubt in doubts:
                    click.echo(f"Warning: {where}{doubt}.", err=True)
            failed += [f"{where}{text}" for text in found]
            noisy += sum(caution.fails for caution in comparison.cautions)
        for text in failed:
            click.echo(f"torchfuse: failed: {text}", err=True)
        # Times that are not to be trusted are no ground to fail or to pass.
        if self.fail_on_noise and noisy:
            click.echo(
                f"torchfuse: {noisy} of the warnings above make these figures worth little "
                "(--fail-on-noise).",
                err=True,
            )
            sys.exit(NOISE)
        if failed:
            sys.exit(GATE)
