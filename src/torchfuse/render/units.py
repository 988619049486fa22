"""Times and sizes with the unit that suits them."""

__all__ = ["duration", "size"]

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
    scale, unit = next((entry for entry in _SIZES if size_bytes >= _NEARLY * entry[0]), _SIZES[-1])
    return f"{size_bytes} bytes" if scale == 1 else f"{size_bytes / scale:.2f} {unit}"
