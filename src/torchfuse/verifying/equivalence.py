"""What a comparison of two models found, per output; plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from torchfuse.units import decibels

__all__ = ["Equivalence", "OutputDifference"]


@dataclass(frozen=True)
class OutputDifference:
    """How far one output of the candidate is from the reference's.

    a is the reference, b the candidate; `None` where there is no number (see `problem`).
    """

    name: str  # "output", "output['logits']", with "case 1: " in front if there are several cases
    max_abs: float | None  # max|a − b|
    max_rel: float | None  # max|a − b| / max|a|
    sqnr_db: float | None  # 10·log10(Σa² / Σ(a−b)²); inf if equal
    passed: bool
    problem: str | None = None  # why it did not pass, a sentence


@dataclass(frozen=True)
class Equivalence:
    """All output differences of one comparison; the properties give the worst of them."""

    outputs: tuple[OutputDifference, ...]
    min_sqnr_db: float | None = None  # the bound that alone decided; None: equality within rounding

    @property
    def passed(self) -> bool:
        """Whether there was something to compare and every output passed."""
        return bool(self.outputs) and all(output.passed for output in self.outputs)

    @property
    def max_abs(self) -> float | None:
        """Largest absolute difference; None if an output could not be compared."""
        return max(_known([output.max_abs for output in self.outputs]), default=None)

    @property
    def max_rel(self) -> float | None:
        """Largest relative difference; None if an output could not be compared."""
        return max(_known([output.max_rel for output in self.outputs]), default=None)

    @property
    def sqnr_db(self) -> float | None:
        """Smallest signal-to-noise ratio; None if an output could not be compared."""
        return min(_known([output.sqnr_db for output in self.outputs]), default=None)

    @property
    def problems(self) -> tuple[str, ...]:
        """One sentence per output that did not pass."""
        return tuple(f"{o.name}: {o.problem}" for o in self.outputs if not o.passed)

    def __bool__(self) -> bool:
        """Whether it passed, so that `assert verify(…)` means what it says."""
        return self.passed

    def __str__(self) -> str:
        """One line per output, the verdict last."""
        lines = [
            f"{o.name}: {o.problem}"
            if o.sqnr_db is None
            else f"{o.name}: max abs {o.max_abs:.3g}, max rel {o.max_rel:.3g}, "
            f"SQNR {decibels(o.sqnr_db)}, {'passed' if o.passed else 'DIFFERS'}"
            for o in self.outputs
        ]
        return "\n".join([*lines, self.verdict])

    @property
    def verdict(self) -> str:
        """What was found, in the words of what it was judged by.

        Noise below a bound is no equivalence: an int8 model's largest error may be a sixth of the
        largest output.
        """
        if self.min_sqnr_db is None:
            return "equivalent" if self.passed else "NOT equivalent"
        if self.passed and self.max_abs == 0:
            return "equal"
        if self.passed and self.sqnr_db is not None and self.sqnr_db < self.min_sqnr_db:
            # Outputs hardly larger than a step of int8, or a bound over more cases than these.
            return f"within the steps of int8: SQNR {decibels(self.sqnr_db)} on these cases"
        where = "within" if self.passed else "NOT within"
        found = "" if self.sqnr_db is None else f"SQNR {decibels(self.sqnr_db)}, "
        return f"{where} the bound: {found}at least {decibels(self.min_sqnr_db)} asked for"


def _known(figures: list[float | None]) -> list[float]:
    """All figures, or none of them if one is unknown."""
    known = [figure for figure in figures if figure is not None]
    return known if len(known) == len(figures) else []
