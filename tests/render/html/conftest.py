"""A browser for all tests of the pages."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from render.html.browser import CHROMIUM, Browser


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium; make test installs it where that can be done")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        found = Browser(Path(profile))
        yield found
        found.close()
