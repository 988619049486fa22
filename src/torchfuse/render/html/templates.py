"""The files that the pages are made of: templates, styles and scripts, beside this one."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["environment_of_pages", "text"]


def text(name: str) -> str:
    """Return what a file holds."""
    return files("torchfuse.render.html").joinpath(name).read_text(encoding="utf-8")


def environment_of_pages() -> Environment:
    """Return what fills in the templates: all that is put in is escaped, and has to be there."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    return Environment(
        loader=FunctionLoader(text), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
