"""Percentiles, and the ratio of two medians with its interval."""

import numpy as np
import pytest

from torchfuse.errors import InputError
from torchfuse.stats import Ratio, Share, percentile, ratio_of_medians, share_of


def noisy(median: float, *, spread: float = 0.02, count: int = 60, seed: int = 0) -> list[float]:
    return list(median * np.random.default_rng(seed).normal(1, spread, count))


@pytest.mark.parametrize(
    ("percent", "expected"),
    [(0, 1.0), (5, 1.2), (25, 2.0), (50, 3.0), (75, 4.0), (95, 4.8), (100, 5.0)],
)
def test_percentiles_are_interpolated_between_samples_in_any_order(
    percent: float, expected: float
) -> None:
    assert percentile([5.0, 1.0, 4.0, 2.0, 3.0], percent) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("round_runs", [None, 1, 5, 7])
@pytest.mark.parametrize("true_ratio", [0.5, 0.9, 1.1, 3.0])
def test_the_interval_holds_the_true_ratio_and_not_one(
    true_ratio: float, round_runs: int | None
) -> None:
    found = ratio_of_medians(noisy(true_ratio, seed=1), noisy(1.0, seed=2), round_runs=round_runs)
    assert found.low <= true_ratio <= found.high
    assert found.low <= found.value <= found.high
    assert found.high - found.low < 0.05 * true_ratio
    assert found.measurable


def test_two_samples_of_the_same_thing_show_no_measurable_difference() -> None:
    found = ratio_of_medians(noisy(1.0, seed=1), noisy(1.0, seed=2))
    assert not found.measurable
    assert str(found).startswith("no measurable difference (")


def test_the_interval_holds_the_true_ratio_95_times_in_100() -> None:
    """Simulated: a wider interval would hold it more often, a narrower one less."""
    random = np.random.default_rng(1)
    simulations, rounds, true_ratio = 1000, 100, 1.3
    below = random.lognormal(0, 0.1, (simulations, rounds))
    above = true_ratio * random.lognormal(0, 0.1, (simulations, rounds))
    held = 0
    for times in zip(above, below, strict=True):
        found = ratio_of_medians(*times, round_runs=1, resamples=200)
        held += found.low <= true_ratio <= found.high
    assert 0.94 <= held / simulations <= 0.96


def test_drawing_rounds_cancels_what_slows_both_down_in_the_same_round() -> None:
    slow_moments = np.random.default_rng(0).uniform(1, 3, 60)
    above = list(slow_moments * np.asarray(noisy(1.05, spread=0.001, seed=1)))
    below = list(slow_moments * np.asarray(noisy(1.0, spread=0.001, seed=2)))
    assert not ratio_of_medians(above, below).measurable
    assert ratio_of_medians(above, below, round_runs=1).measurable


def test_neighbours_that_are_alike_do_not_count_as_independent() -> None:
    # Twelve rounds of five equal samples each: twelve observations, not sixty.
    above = [value for value in noisy(1.0, count=12, seed=1) for _ in range(5)]
    below = [value for value in noisy(1.0, count=12, seed=2) for _ in range(5)]
    one_by_one = ratio_of_medians(above, below, round_runs=1)
    by_round = ratio_of_medians(above, below, round_runs=5)
    assert by_round.high - by_round.low > 1.5 * (one_by_one.high - one_by_one.low)


@pytest.mark.parametrize("count", [1, 4, 5, 7])
def test_too_few_rounds_have_a_ratio_and_no_interval(count: int) -> None:
    found = ratio_of_medians([2.0] * count, [1.0] * count, round_runs=5)
    assert (found.value, found.low, found.high) == (2.0, None, None)
    assert not found.measurable
    assert str(found) == "no measurable difference (too few runs to say)"


@pytest.mark.parametrize("rounds", [6, 10, 17])
def test_the_same_against_the_same_in_rounds_is_rarely_a_difference(rounds: int) -> None:
    def taken(seed: int) -> list[float]:
        random = np.random.default_rng(seed)
        return list(
            np.repeat(random.lognormal(0, 0.1, rounds), 3) * random.normal(1, 0.01, 3 * rounds)
        )

    found = [ratio_of_medians(taken(2 * i), taken(2 * i + 1), round_runs=3) for i in range(100)]
    assert sum(ratio.measurable for ratio in found) <= 10


def test_the_value_is_of_the_rounds_that_the_interval_is_of() -> None:
    found = ratio_of_medians([2.0] * 30 + [9.0] * 4, [1.0] * 34, round_runs=5)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_the_same_samples_give_the_same_interval() -> None:
    above, below = noisy(1.1, seed=1), noisy(1.0, seed=2)
    assert ratio_of_medians(above, below) == ratio_of_medians(above, below)


def test_samples_of_different_numbers_can_be_compared_unless_they_claim_to_be_of_one_run() -> None:
    above, below = noisy(2.0, count=40), noisy(1.0, count=30)
    assert ratio_of_medians(above, below).measurable
    with pytest.raises(InputError, match=r"equal numbers, got 40 and 30"):
        ratio_of_medians(above, below, round_runs=1)


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [1.0, 0.0], [float("inf")]])
def test_samples_that_are_no_times_are_refused(samples: list[float]) -> None:
    with pytest.raises(InputError, match="at least one time above zero"):
        ratio_of_medians(samples, [1.0])
    with pytest.raises(InputError, match="at least one time above zero"):
        percentile(samples, 50)


@pytest.mark.parametrize(
    ("low", "high", "measurable"),
    [(0.9, 0.99, True), (0.9, 1.0, False), (1.0, 1.1, False), (1.01, 1.1, True)],
)
def test_an_interval_that_touches_one_is_no_difference(
    low: float, high: float, measurable: bool
) -> None:
    assert Ratio((low + high) / 2, low, high).measurable is measurable


def test_a_ratio_reads_with_its_interval() -> None:
    assert str(Ratio(1.523, 1.488, 1.551)) == "1.52 (1.49 … 1.55)"
    assert str(Ratio(1.0, 0.97, 1.02)) == "no measurable difference (0.97 … 1.02)"


@pytest.mark.parametrize("round_runs", [None, 1])
def test_a_ratio_is_of_the_medians(round_runs: int | None) -> None:
    above, below = [6.0] * 7 + [600.0], [4.0] * 7 + [0.1]
    found = ratio_of_medians(above, below, round_runs=round_runs)
    assert (found.value, found.low, found.high) == (1.5, 1.5, 1.5)


@pytest.mark.parametrize(
    ("hits", "samples", "low", "high"),
    [  # Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_of_a_share_is_wilsons(
    hits: int, samples: int, low: float, high: float
) -> None:
    found = share_of(hits, samples)
    assert (found.value, found.samples) == (hits / samples, samples)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    misses = share_of(samples - hits, samples)
    assert (round(1 - misses.high, 4), round(1 - misses.low, 4)) == (low, high)
    assert 0 <= found.low <= found.high <= 1


def test_a_share_reads_in_percent_with_its_interval_if_that_is_known() -> None:
    assert str(Share(0.985, 0.962, 0.994, 200)) == "98.50 % (96.2 … 99.4)"
    assert str(Share(0.985)) == "98.50 %"
