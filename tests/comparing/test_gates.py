"""Gates: what a condition means, and how an earlier comparison is judged by."""

import math
from dataclasses import replace

import pytest

from torchfuse.comparing.comparison import FOLDED, NOT_FUSED, Comparison, Row
from torchfuse.comparing.gates import failures, parse_condition, parse_share, slower
from torchfuse.devices.facts import DeviceFacts
from torchfuse.errors import InputError
from torchfuse.measuring.timing import Measurement
from torchfuse.stats import Ratio, Share
from torchfuse.verifying.equivalence import Equivalence, OutputDifference


def row(variant: str, target: str, precision: str, ms: float, **more: object) -> Row:
    given = {
        "size_bytes": 2_000_000,
        "difference": Equivalence((OutputDifference("output", 0.1, 0.02, 31.0, True),)),
        "accuracy": Share(0.97),
        "delegation": None,
        **more,
    }
    samples = tuple(ms * 1e-3 * (1 + 0.001 * i) for i in range(21))
    latency = Measurement("m", samples, 1, True, 1)
    return Row(variant, target, precision, latency, Ratio(2.0, 1.9, 2.1), **given)


COMPARISON = Comparison(
    "Net",
    (
        row(NOT_FUSED, "eager", "fp32", 8, accuracy=Share(0.98)),
        row(FOLDED, ".pte", "fp32", 4),
        row(FOLDED, ".pte", "int8", 2),
    ),
    (),
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("latency > 5 ms", 1),
        ("latency > 1000 us", 3),
        ("pte latency > 1 ms", 2),
        ("pte.int8 latency > 1 ms", 1),
        ("int8.pte latency >= 3 ms", 0),
        ("not-fused latency > 1 ms", 1),
        ("pte.int8 size > 1.9 MB", 1),
        ("pte.int8 size > 1.95 MiB", 0),
        ("speedup < 3", 3),
        ("speedup < 1.5x", 0),
        ("difference > 1e-2", 3),
        ("sqnr < 30 dB", 0),
        ("accuracy < 97.5%", 2),
        ("drop > 0.5 points", 2),
        ("pte.int8 drop>1.5 points", 0),
    ],
)
def test_a_condition_is_met_by_as_many_rows(text: str, count: int) -> None:
    assert len(failures(parse_condition(text), COMPARISON)) == count


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("onnx latency > 1 ms", "could not be judged: there is no such row"),
        ("pte agreement < 99%", "could not be judged: its agreement is not known"),
        ("delegation < 90%", "could not be judged: its delegation is not known"),
    ],
)
def test_what_cannot_be_judged_is_a_failure(text: str, message: str) -> None:
    (found,) = failures(parse_condition(text), COMPARISON)
    assert message in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latency > 5", "needs a bound in 's' or 'ms' or 'us' or 'µs', got '5 '"),
        ("latency > 5 MB", "needs a bound in 's' or"),
        ("speed > 5 ms", "is about 'speed', which is none of latency, size"),
        ("latency is high", "is no condition: expected rows, a quantity"),
        ("latency > 1.2.3 ms", "has no number to compare with: '1.2.3'"),
        ("difference > 1 dB", "needs a bound without a unit"),
    ],
)
def test_a_condition_that_cannot_be_read_says_what_is_missing(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_condition(text)


def test_a_failure_names_the_row_and_its_figure() -> None:
    (found,) = failures(parse_condition("pte.int8 latency > 1 ms"), COMPARISON)
    assert found == "'pte.int8 latency > 1 ms': folded by lowering, .pte int8, has 2.02 ms."


def test_a_share_is_in_percent() -> None:
    assert parse_share("2.5 %") == 0.025
    with pytest.raises(InputError, match=r"Expected a share such as 5%, got '0\.05'"):
        parse_share("0.05")


def scaled(factor: float, noise: float = 0.0) -> Comparison:
    def changed(row: Row) -> Row:
        samples = tuple(
            s * factor * (1 + noise * math.sin(37 * i)) for i, s in enumerate(row.latency.samples_s)
        )
        return replace(row, latency=replace(row.latency, samples_s=samples))

    return replace(COMPARISON, rows=tuple(map(changed, COMPARISON.rows)))


def test_what_is_surely_slower_by_more_fails() -> None:
    failed, doubts = slower(scaled(1.1), COMPARISON, 0.05)
    assert len(failed) == 3
    assert failed[0].startswith("not fused, eager fp32, takes 1.10 times (1.09 … 1.1")
    assert doubts == []


def test_what_may_be_chance_does_not() -> None:
    assert slower(scaled(1.06, noise=0.5), COMPARISON, 0.05)[0] == []
    assert slower(scaled(0.5), COMPARISON, 0.05)[0] == []


def test_another_processor_is_a_doubt() -> None:
    def on(soc: str) -> Comparison:
        return replace(COMPARISON, devices=(DeviceFacts("local", "ready", soc=soc),))

    _, doubts = slower(on("B"), on("A"), 0.05)
    assert doubts == ["the baseline was measured on another processor (A, now B)"]


def test_a_baseline_of_something_else_is_an_error() -> None:
    other = replace(COMPARISON, rows=(row("other", "eager", "fp32", 1),))
    with pytest.raises(InputError, match="has no row in common with this comparison"):
        slower(COMPARISON, other, 0.05)
