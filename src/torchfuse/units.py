"""Figures with their units: times, sizes, shares in percent, and noise in decibels."""

import math

__all__ = ["decibels", "duration", "percent", "scaled", "size", "size_unit", "sqnr_db"]

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
_NEARLY = 1 - 5e-6  # of a unit, which two decimals show as 1000.00 of the one below


def duration(seconds: float, like: float | None = None) -> str:
    """Return a time with a unit that suits it, or that suits `like`.

    >>> duration(0.0123456)
    '12.35 ms'
    >>> duration(0.000004, like=0.0123)
    '0.00 ms'
    """
    reference = seconds if like is None else like
    scale, unit = next((entry for entry in _UNITS if reference >= _NEARLY * entry[0]), _UNITS[-1])
    return f"{seconds / scale:.2f} {unit}"


def size(size_bytes: int) -> str:
    """Return a size with a unit that suits it.

    >>> size(3738912)
    '3.74 MB'
    """
    scale, unit = size_unit(size_bytes)
    return f"{size_bytes} bytes" if scale == 1 else f"{size_bytes / scale:.2f} {unit}"


def size_unit(size_bytes: int) -> tuple[float, str]:
    """Return the unit that suits a size, in bytes, and its name."""
    return next((entry for entry in _SIZES if size_bytes >= _NEARLY * entry[0]), _SIZES[-1])


def scaled(number: float, units: tuple[str, ...]) -> str:
    """Return three significant digits and one of the units, each a thousand times the one before.

    >>> scaled(1_234_567, ("B", "kB", "MB"))
    '1.23 MB'
    """
    for unit in units[:-1]:
        if abs(number) < 999.5:
            return f"{number:.3g} {unit}".rstrip()
        number /= 1000
    return f"{number:.3g} {units[-1]}"


def percent(share: float, digits: int = 2) -> str:
    """Return a share of 1, or a ratio, in percent."""
    return f"{100 * share:.{digits}f} %"


def decibels(ratio_db: float) -> str:
    """Return a signal-to-noise ratio with its unit."""
    return f"{ratio_db:.1f} dB"


def sqnr_db(signal: float, noise: float) -> float:
    """Return 10 · log10(signal / noise), both sums of squares; inf where nothing differs."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal / noise > 0 else -math.inf
