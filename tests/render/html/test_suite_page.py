"""The page of a suite in a real browser: its table is sorted and filtered, with keyboard too."""

from dataclasses import replace
from pathlib import Path

import pytest

from render.html.browser import Browser, complaints
from torchfuse.comparing.comparison import Comparison, Row
from torchfuse.devices.facts import DeviceFacts
from torchfuse.measuring.timing import Measurement
from torchfuse.render.html.suite_page import page
from torchfuse.stats import Ratio
from torchfuse.suites.results import Failure, Result, SuiteResult
from torchfuse.verifying.equivalence import Equivalence, OutputDifference


def row(precision: str, time_s: float, size_bytes: int | None) -> Row:
    latency = Measurement("m", (time_s,) * 20, 1, True, 1)
    same = Equivalence((OutputDifference("output", 0.0, 0.0, float("inf"), True),))
    speed_up = Ratio(1.0, 1.0, 1.0)
    return Row("fused", ".pte", precision, latency, speed_up, size_bytes, same, None, None)


def result(name: str, *rows: Row) -> Result:
    comparison = Comparison("Net", rows, (), devices=(DeviceFacts("local", "ready", soc="cpu"),))
    return Result(name, name, "net.py:net", None, "", ("local",), comparison, {"local": "host"})


SUITE = SuiteResult(
    (
        result("second", row("fp32", 9e-3, 9_000_000), row("int8", 2e-3, None)),
        result("first", row("fp32", 10e-3, 800_000), row("int8", 1e-3, 200_000)),
        replace(
            result("third"),
            comparison=None,
            machines={},
            failures=(Failure("making its files", "it raised <b>RuntimeError</b>"),),
        ),
    )
)


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Browser:
    path = tmp_path / "suite.html"
    path.write_text(page(SUITE))
    browser.open(path, width=1280)
    return browser


def column(browser: Browser, number: int) -> list[str]:
    """The cells of the table of every form that are shown."""
    found: list[str] = browser.run(
        "[...document.getElementById('table').tBodies[0].rows].filter((row) => !row.hidden)"
        f".map((row) => row.cells[{number}].textContent)"
    )
    return found


def press_heading(browser: Browser, text: str) -> None:
    browser.run(
        f"[...document.querySelectorAll('#table th button')]"
        f".find((button) => button.textContent === {text!r}).focus()"
    )
    browser.press("Enter", "\r")


def test_numbers_are_sorted_by_size_both_ways_and_what_is_unknown_comes_last(
    opened: Browser,
) -> None:
    press_heading(opened, "median")
    assert [float(text.split()[0]) for text in column(opened, 5)] == [1, 2, 9, 10]
    press_heading(opened, "median")
    assert [float(text.split()[0]) for text in column(opened, 5)] == [10, 9, 2, 1]
    for _ in range(2):  # up, and down
        press_heading(opened, "size")
        assert column(opened, 7)[-1].strip() in ("", "–")


def test_the_heading_that_sorts_is_told_to_who_does_not_see_it(opened: Browser) -> None:
    press_heading(opened, "model")
    assert column(opened, 0) == ["first", "first", "second", "second"]
    told = "document.querySelectorAll('#table th[aria-sort=ascending]')"
    assert opened.run(f"[...{told}].map((heading) => heading.textContent)") == ["model"]


def test_words_and_choices_filter_together_and_the_number_is_said(opened: Browser) -> None:
    def give(selector: str, value: str, event: str) -> None:
        opened.run(
            f"(() => {{ const e = document.querySelector({selector!r}); e.value = {value!r};"
            f" e.dispatchEvent(new Event({event!r})); }})()"
        )

    give("#search", "first .pte", "input")
    give("select[data-column='3']", "int8", "change")
    assert column(opened, 0) == ["first"]
    assert opened.run("document.getElementById('shown').textContent") == "1 of 4 rows."
    give("#search", "", "input")
    assert column(opened, 0) == ["second", "first"]


@pytest.mark.parametrize("width", [360, 864, 1400])
def test_it_fits_any_width_asks_for_nothing_and_names_what_was_not_done(
    browser: Browser, tmp_path: Path, width: int
) -> None:
    path = tmp_path / "suite.html"
    path.write_text(page(SUITE))
    browser.open(path, width=width)
    assert complaints(browser) == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert "it raised <b>RuntimeError</b>" in browser.run(
        "document.getElementById('failed').textContent"
    )
