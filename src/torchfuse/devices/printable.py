"""What a device said, fit for a terminal: it may say anything, escape sequences included."""

__all__ = ["printable"]

_LONGEST = 300  # characters of a name, or of a reason


def printable(text: str) -> str:
    r"""Return the text on one line, as a terminal shows and does not obey it, cut where too long.

    >>> printable("Pixel\t8\x1b[2J\n")
    'Pixel 8\ufffd[2J'
    """
    shown = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]} …"
