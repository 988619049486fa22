"""Listed noise is dropped; everything else comes through."""

import logging
import os
import sys
import warnings

import pytest

from torchfuse.isolation.warning_filters import known_warnings_ignored, runtime_logs_captured


def test_a_warning_that_is_not_listed_comes_through() -> None:
    with pytest.warns(FutureWarning, match="something else"), known_warnings_ignored():
        warnings.warn("something else", FutureWarning, stacklevel=1)


def test_a_listed_warning_from_elsewhere_comes_through() -> None:
    with pytest.warns(FutureWarning, match="treespec"), known_warnings_ignored():
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated", FutureWarning, stacklevel=1)


def test_log_records_are_dropped_by_their_message_and_only_inside(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("torchao")
    caplog.set_level(logging.WARNING, "torchao")  # whatever a library has made of the root's
    with known_warnings_ignored():
        logger.warning("Failed to load kernels.so: no such file")
        logger.warning("something else")
    logger.warning("Failed to load more.so")
    assert caplog.messages == ["something else", "Failed to load more.so"]


def test_lines_of_the_runtime_are_dropped_and_others_come_through(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with runtime_logs_captured() as lines:
        os.write(2, b"[threadpool.cpp:66] Resetting threadpool to 1 threads.\n[method.cpp:1] No.\n")
        print("[method.cpp:2] Never.", file=sys.stderr)
    assert lines == ["[method.cpp:1] No.", "[method.cpp:2] Never."]
    assert capfd.readouterr().err == "[method.cpp:1] No.\n[method.cpp:2] Never.\n"


def test_after_an_exception_the_lines_are_in_the_list_only(
    capfd: pytest.CaptureFixture[str],
) -> None:
    lines: list[str] = []

    def fail() -> None:
        nonlocal lines
        with runtime_logs_captured() as lines:
            os.write(2, b"[method.cpp:1] No.\n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert lines == ["[method.cpp:1] No."]
    assert capfd.readouterr().err == ""
