"""Figures with the units that suit them."""

import math

import pytest

from torchfuse.units import decibels, duration, percent, size, sqnr_db


@pytest.mark.parametrize(
    ("seconds", "like", "text"),
    [
        (1.5, None, "1.50 s"),
        (1.0, None, "1.00 s"),
        (0.9999, None, "999.90 ms"),
        (0.999996, None, "1.00 s"),
        (0.0123456, None, "12.35 ms"),
        (0.0000042, None, "4.20 µs"),
        (0.0000000042, None, "4.20 ns"),
        (0.0, None, "0.00 ns"),
        (0.0004, 0.0123, "0.40 ms"),
    ],
)
def test_a_time_has_the_unit_that_suits_it(seconds: float, like: float | None, text: str) -> None:
    assert duration(seconds, like) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (999_999, "1.00 MB"),
        (3738912, "3.74 MB"),
        (2e9, "2.00 GB"),
    ],
)
def test_a_size_has_the_unit_that_suits_it(size_bytes: int, text: str) -> None:
    assert size(size_bytes) == text


@pytest.mark.parametrize(
    ("signal", "noise", "found_db"),
    [(100, 1, 20), (1, 0, math.inf), (0, 1, -math.inf), (1e-300, 1e300, -math.inf)],
)
def test_signal_to_noise_is_in_decibels(signal: float, noise: float, found_db: float) -> None:
    assert sqnr_db(signal, noise) == found_db


def test_shares_and_decibels_have_their_units() -> None:
    assert (percent(0.985), percent(0.985, 0), decibels(37.64)) == ("98.50 %", "98 %", "37.6 dB")
