"""What the report is drawn with, which comes with an extra."""

from importlib.util import find_spec

from torchfuse.errors import UnsupportedError

__all__ = ["require_libraries"]

_LIBRARIES = ("altair", "vl_convert", "jinja2")


def require_libraries() -> None:
    """Find out, before any work, whether a report can be drawn here.

    Raises:
        UnsupportedError: something is not installed.
    """
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"The report takes {' and '.join(missing)}, which is not installed: "
            "pip install 'torchfuse[report]'."
        )
