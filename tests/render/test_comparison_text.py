"""A comparison as text: every figure with its unit, and what was bought in one sentence."""

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from torchfuse.comparing.comparison import FOLDED, NOT_FUSED, Comparison, Row
from torchfuse.delegation import Delegation, OperatorDelegation
from torchfuse.measuring.cautions import Caution
from torchfuse.measuring.timing import Measurement, ratio
from torchfuse.render.comparison_text import (
    caution_lines,
    closing_sentence,
    delegation_lines,
    legend,
    markdown,
    renderable,
    table,
)
from torchfuse.render.comparison_text import text as whole_text
from torchfuse.stats import Share
from torchfuse.verifying.equivalence import Equivalence, OutputDifference

GOLDEN = (Path(__file__).parent / "comparison.golden.txt").read_text()


def row(variant, target, precision, median_s, size_bytes, max_rel, accuracy, delegation=None):
    def latency(seconds):
        return Measurement(
            "m", tuple(seconds * f for f in (0.99, 0.995, 1, 1, 1.005, 1.01)), 1, True, 1
        )

    difference = OutputDifference("output", max_rel, max_rel, 60.0, True)
    return Row(
        variant,
        target,
        precision,
        latency(median_s),
        ratio(latency(4e-3), latency(median_s)),
        size_bytes,
        Equivalence((difference,), 14.0 if precision == "int8" else None),
        None if accuracy is None else Share(accuracy),
        delegation,
    )


ROWS = (
    row(NOT_FUSED, "eager", "fp32", 4e-3, None, 0.0, 0.99),
    row("fused", "eager", "fp32", 2e-3, None, 1e-7, 0.99),
    row(FOLDED, ".pte", "fp32", 1e-3, 1_200_000, 2e-7, 0.99),
    row(FOLDED, ".pte", "int8", 5e-4, 300_000, 1e-2, 0.985),
)


def text(comparisons):
    console = Console(file=io.StringIO(), width=120)
    console.print(table(comparisons))
    return "".join(line.rstrip() + "\n" for line in console.file.getvalue().splitlines())


def test_the_table():
    assert text([Comparison("Net", ROWS, ())]) == GOLDEN


def test_the_closing_sentence_says_what_fusing_and_what_quantizing_bought():
    assert closing_sentence(Comparison("Net", ROWS, ())) == (
        "Net: fusing made it 2.00× (1.98…2.02) as fast in eager mode (+0.00 points of accuracy); "
        "quantizing made it 2.00× (1.98…2.02) as fast in ExecuTorch (25 % of the size, "
        "-0.50 points of accuracy)."
    )


@pytest.mark.parametrize(
    ("suffix", "runtime"),
    [(".onnx", "ONNX Runtime"), (".xml", "OpenVINO"), (".aoti.pt2", "AOTInductor")],
)
def test_the_closing_sentence_says_it_of_every_runtime(suffix: str, runtime: str) -> None:
    rows = (*ROWS[:2], *(replace(row, target=suffix) for row in ROWS[2:]))
    assert f"as fast in {runtime} (25 % of the size" in closing_sentence(
        Comparison("Net", rows, ())
    )


@pytest.mark.parametrize("rows", [ROWS[:1], (ROWS[0], ROWS[2])])
def test_what_was_not_compared_bought_nothing(rows):
    assert "quantizing was not compared" in closing_sentence(Comparison("Net", rows, ()))


def test_an_interval_that_includes_1_is_no_measurable_difference():
    rows = (ROWS[0], row("fused", "eager", "fp32", 4e-3, None, 0.0, None))
    sentence = closing_sentence(Comparison("Net", rows, ()))
    assert "fusing made no measurable difference in eager mode" in sentence
    assert "not measurable" in text([Comparison("Net", rows, ())])


def test_the_widest_cells_are_not_cut():
    rows = (
        row(NOT_FUSED, "eager", "fp32", 0.98765, None, 0.0, 1.0),
        row("bn-relu fused", "channels_last", "fp32", 4e-3, 123_456_789, 0.0, 1.0),
        row("bn-relu fused", ".pt", "fp32", 1e-3, 123_456_789, 1.0, 1.0),
    )
    assert "…\n" not in text([Comparison("AnnotatedConvBnReLUModel", rows, ())])
    for cell in (
        "AnnotatedConvBnReLUModel",
        "channels_last fp32",
        "not measurable",
        "123.46 MB",
        "987.65 ms",
    ):
        assert cell in text([Comparison("AnnotatedConvBnReLUModel", rows, ())])


def test_the_share_that_the_delegate_runs_is_told():
    conv = OperatorDelegation("convolution", 3, 1, 900, 100, 64, ("Conv3d",))
    relu = OperatorDelegation("relu", 4, 0, 0, 0, 0, ())
    delegation = Delegation("XNNPACK", 1, (conv, relu), 1000, ())
    rows = (*ROWS, row(FOLDED, ".pte", "fp16", 1e-3, 1, 1e-3, None, delegation))
    assert delegation_lines(Comparison("Net", rows, ())) == [
        "fp16 .pte: XNNPACK runs 90.0 % of the multiply-accumulates and 7 of 8 operator calls."
    ]


def test_a_slowdown_is_called_one():
    rows = (*ROWS[:1], row("fused", "eager", "fp32", 8e-3, None, 0.0, None))
    sentence = closing_sentence(Comparison("Net", rows, ()))
    assert "fusing made it slower, 0.50× (0.50…0.51) as fast, in eager mode" in sentence


def test_the_closing_sentence_says_for_which_processors_it_holds() -> None:
    sentence = closing_sentence(Comparison("Net", ROWS, (), "x86_64"))
    assert sentence.startswith("Net, on x86_64: fusing made it ")


def test_int8_is_shown_by_its_noise_and_equal_outputs_as_no_difference() -> None:
    equal = Equivalence((OutputDifference("output", 0.0, 0.0, math.inf, True),), 14.0)
    shown = text([Comparison("Net", (ROWS[0], ROWS[3], replace(ROWS[3], difference=equal)), ())])
    noisy, same = shown.splitlines()[3:]
    assert "60.0 dB" in noisy
    assert "0.0e+00" in same


LOAD = Caution("other-load", "other programs used 80% of the time; close them", fails=True)
SPREAD = Caution("spread", "the median is known to ±9.0% only; give about 90 runs", True, "a")


def cautioned(*cautions: Caution) -> tuple[Row, ...]:
    return (
        replace(ROWS[0], latency=replace(ROWS[0].latency, cautions=cautions)),
        *ROWS[1:],
    )


def test_what_makes_the_times_less_trustworthy_is_below_the_table() -> None:
    comparison = Comparison("Net", cautioned(LOAD, SPREAD), ("left out: int8",))
    assert comparison.cautions == (LOAD, SPREAD)
    assert whole_text(comparison).splitlines()[-3:] == [
        "Note: left out: int8",
        "Warning: other programs used 80% of the time; close them.",
        "Warning: a: the median is known to ±9.0% only; give about 90 runs.",
    ]


def test_of_several_models_a_line_names_its_own() -> None:
    several = [Comparison("Net", ROWS, ("left out: int8",)), Comparison("Other", ROWS, ())]
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable(several))
    assert "\nNote, Net: left out: int8\n" in console.file.getvalue()


def test_the_words_of_the_table_are_explained_where_they_stand_in_it() -> None:
    assert "Folded by lowering: " in legend([Comparison("Net", ROWS, ())])
    assert "Folded by lowering: " not in legend([Comparison("Net", ROWS[:2], ())])


def test_a_warning_that_many_rows_have_is_one_line() -> None:
    rows = cautioned(SPREAD, replace(SPREAD, name="b"), replace(SPREAD, name="c"))
    assert caution_lines([Comparison("Net", rows, ())]) == [
        "Warning: a (and 2 more rows): the median is known to ±9.0% only; give about 90 runs."
    ]


def test_of_several_models_a_warning_names_its_own() -> None:
    several = [Comparison("Net", ROWS, ()), Comparison("Other", cautioned(LOAD), ())]
    assert caution_lines(several) == [
        "Warning: Other: other programs used 80% of the time; close them."
    ]


def test_the_same_as_markdown() -> None:
    comparison = Comparison("Net", cautioned(LOAD), ("left out: fp|16",))
    assert (
        markdown(comparison)
        == """\
| variant | target | median | IQR | speed-up | size | differs by | accuracy |
|---|---|---:|---:|---:|---:|---:|---:|
| not fused | eager fp32 | 4.00 ms | 30.00 µs | baseline |  |  | 99.00 % |
| fused | eager fp32 | 2.00 ms | 15.00 µs | 2.00× (1.98…2.02) |  | 1.0e-07 | 99.00 % |
| folded by lowering | .pte fp32 | 1.00 ms | 7.50 µs | 4.00× (3.96…4.04) | 1.20 MB | 2.0e-07 | 99.00 % |
| folded by lowering | .pte int8 | 500.00 µs | 3.75 µs | 8.00× (7.92…8.08) | 300.00 kB | 60.0 dB | 98.50 % |

Speed-ups are over the first row of each device; in brackets are 95 % intervals; IQR is the range \
of the middle half of the times. Differences are from the first row's outputs, on the example \
inputs: the largest over the largest output, or in dB, signal to noise. Folded by lowering: what \
makes such a file folds batch norms itself, so that there is none that is not fused.

Net: fusing made it 2.00× (1.98…2.02) as fast in eager mode (+0.00 points of accuracy); quantizing \
made it 2.00× (1.98…2.02) as fast in ExecuTorch (25 % of the size, -0.50 points of accuracy).

- left out: fp|16
- Warning: other programs used 80% of the time; close them.
"""  # noqa: E501
    )
