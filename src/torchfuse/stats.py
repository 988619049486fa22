"""The statistics of what is measured: spread, percentiles, ratios of medians, shares of samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchfuse.errors import InputError
from torchfuse.units import percent

__all__ = ["Ratio", "Share", "percentile", "ratio_of_medians", "share_of"]


@dataclass(frozen=True)
class Ratio:
    """A ratio of two medians, and the interval that holds the true one at this confidence."""

    value: float
    low: float | None  # None: too few rounds to say
    high: float | None
    confidence: float = 0.95

    @property
    def measurable(self) -> bool:
        """Whether there is a difference at all: the interval leaves 1 out."""
        return self.low is not None and self.high is not None and not self.low <= 1.0 <= self.high

    def __str__(self) -> str:
        """The ratio as text: `1.52 (1.49 … 1.55)`, or `no measurable difference (…)`."""
        known = self.low is not None and self.high is not None
        interval = f"({self.low:.2f} … {self.high:.2f})" if known else "(too few runs to say)"
        return f"{self.value:.2f} {interval}" if self.measurable else f"{_NO_DIFFERENCE} {interval}"


_NO_DIFFERENCE = "no measurable difference"


@dataclass(frozen=True)
class Share:
    """A share of samples, 0 to 1, and the interval that holds the true one at this confidence."""

    value: float
    low: float | None = None  # None: it is not known of how many samples
    high: float | None = None
    samples: int | None = None
    confidence: float = 0.95

    def __str__(self) -> str:
        """The share in percent: `98.50 % (96.2 … 99.4)`."""
        if self.low is None or self.high is None:
            return percent(self.value)
        return f"{percent(self.value)} ({100 * self.low:.1f} … {100 * self.high:.1f})"


_Z = 1.959964  # of the normal distribution, at 95 %


def share_of(hits: int, samples: int) -> Share:
    """Return the share of `samples` that are hits, with its 95 % interval.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927: it
    holds near 0 and 1 and for few samples too.

    >>> print(share_of(50, 50))
    100.00 % (92.9 … 100.0)
    """
    p, z2 = hits / samples, _Z * _Z
    centre = (p + z2 / (2 * samples)) / (1 + z2 / samples)
    spread = _Z * math.sqrt(p * (1 - p) / samples + z2 / (4 * samples**2)) / (1 + z2 / samples)
    return Share(p, max(0.0, centre - spread), min(1.0, centre + spread), samples)


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
    cancels, and neighbours, which are alike, do not count as independent. A last, shorter round is
    left out. With too few rounds (or samples) nothing can be said: there is no interval.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

    >>> ratio_of_medians([2.0] * 6, [1.0] * 6)
    Ratio(value=2.0, low=2.0, high=2.0, confidence=0.95)
    >>> ratio_of_medians([2.0] * 5, [1.0] * 5)
    Ratio(value=2.0, low=None, high=None, confidence=0.95)
    """
    above, below = _checked(numerator), _checked(denominator)
    if round_runs is not None and len(above) != len(below):
        raise InputError(
            f"Samples of the same rounds come in equal numbers, got {len(above)} and {len(below)}; "
            "leave out round_runs for samples of separate runs."
        )
    independent = min(len(above), len(below))
    if round_runs is not None:
        independent = len(above) // round_runs
        whole = independent * round_runs or len(above)
        above, below = above[:whole], below[:whole]
    value = float(np.median(above) / np.median(below))
    if 2 * 0.5**independent > 1 - confidence:  # even if all differ the same way: the sign test
        return Ratio(value, None, None, confidence)
    random = np.random.default_rng(seed)
    if round_runs is None:
        draw_above = random.integers(len(above), size=(resamples, len(above)))
        draw_below = random.integers(len(below), size=(resamples, len(below)))
    else:
        drawn = random.integers(independent, size=(resamples, independent, 1))
        within = np.arange(round_runs)
        draw_above = draw_below = (drawn * round_runs + within).reshape(resamples, -1)
    ratios = np.median(above[draw_above], axis=1) / np.median(below[draw_below], axis=1)
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return Ratio(value, float(low), float(high), confidence)


def _checked(samples: Sequence[float]) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all() or (values <= 0).any():
        raise InputError(
            f"Expected at least one time above zero, got {values.size} samples"
            f"{': ' + str(values.min()) if values.size else ''}; run the measurement again."
        )
    return values
