"""The statistics of timing samples: spread, percentiles, and the ratio of two medians."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchfuse.errors import InputError

__all__ = ["Ratio", "percentile", "ratio_of_medians"]


@dataclass(frozen=True)
class Ratio:
    """A ratio of two medians, and the interval that holds the true one at this confidence."""

    value: float
    low: float
    high: float
    confidence: float = 0.95

    @property
    def measurable(self) -> bool:
        """Whether there is a difference at all: the interval leaves 1 out."""
        return not self.low <= 1.0 <= self.high

    def __str__(self) -> str:
        """The ratio as text: `1.52 (1.49 … 1.55)`, or `no measurable difference (…)`."""
        interval = f"({self.low:.2f} … {self.high:.2f})"
        return f"{self.value:.2f} {interval}" if self.measurable else f"{_NO_DIFFERENCE} {interval}"


_NO_DIFFERENCE = "no measurable difference"


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return the value that `percent` % of the samples do not exceed, interpolated linearly.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 50)
    2.5
    """
    return float(np.percentile(_checked(samples), percent))


def ratio_of_medians(
    numerator: Sequence[float],
    denominator: Sequence[float],
    *,
    round_runs: int | None = None,
    confidence: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> Ratio:
    """Return median(numerator) / median(denominator), with its percentile bootstrap interval.

    `round_runs` says that both were taken in the same rounds, this many samples of each in a row.
    Rounds are then drawn as a whole, so that a slow moment of the machine, which hits both,
    cancels, and neighbours, which are alike, do not count as independent.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

    >>> ratio_of_medians([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
    Ratio(value=2.0, low=2.0, high=2.0, confidence=0.95)
    """
    above, below = _checked(numerator), _checked(denominator)
    if round_runs is not None and len(above) != len(below):
        raise InputError(
            f"Samples of the same rounds come in equal numbers, got {len(above)} and {len(below)}; "
            "leave out round_runs for samples of separate runs."
        )
    random = np.random.default_rng(seed)
    if round_runs is None:
        draw_above = random.integers(len(above), size=(resamples, len(above)))
        draw_below = random.integers(len(below), size=(resamples, len(below)))
    else:
        rounds = max(len(above) // round_runs, 1)  # a last, shorter round is not drawn
        drawn = random.integers(rounds, size=(resamples, rounds, 1))
        within = np.arange(min(round_runs, len(above)))
        draw_above = draw_below = (drawn * round_runs + within).reshape(resamples, -1)
    ratios = np.median(above[draw_above], axis=1) / np.median(below[draw_below], axis=1)
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(ratios, [tail, 100 - tail])
    value = np.median(above) / np.median(below)
    return Ratio(float(value), float(low), float(high), confidence)


def _checked(samples: Sequence[float]) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all() or (values <= 0).any():
        raise InputError(
            f"Expected at least one time above zero, got {values.size} samples"
            f"{': ' + str(values.min()) if values.size else ''}; run the measurement again."
        )
    return values
