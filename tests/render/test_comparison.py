"""A comparison as text: every figure with its unit, and what was bought in one sentence."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from torchfuse.comparison import FOLDED, NOT_FUSED, Comparison, Row
from torchfuse.delegation import Delegation, OperatorDelegation
from torchfuse.equivalence import Equivalence, OutputDifference
from torchfuse.render.comparison import closing_sentence, delegation_lines, table
from torchfuse.timing import Measurement, ratio

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
        Equivalence((difference,)),
        accuracy,
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
        "Net, fp16 .pte: XNNPACK runs 90.0 % of the multiply-accumulates and 7 of 8 operator calls."
    ]


def test_a_slowdown_is_called_one():
    rows = (*ROWS[:1], row("fused", "eager", "fp32", 8e-3, None, 0.0, None))
    sentence = closing_sentence(Comparison("Net", rows, ()))
    assert "fusing made it slower, 0.50× (0.50…0.51) as fast, in eager mode" in sentence


def test_the_closing_sentence_says_for_which_processors_it_holds() -> None:
    sentence = closing_sentence(Comparison("Net", ROWS, (), "x86_64"))
    assert sentence.startswith("Net, on x86_64: fusing made it ")
