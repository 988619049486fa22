"""How a plan reads; the golden files are what the command prints."""

from dataclasses import replace
from pathlib import Path

import pytest

from torchfuse.planning import Fusion, FusionPlan, Skip, WholeCost
from torchfuse.render.plan_text import text

GOLDEN = Path(__file__).parent / "golden"
PLAN = FusionPlan(
    model="RepVGG",
    scope=(
        "forward(1×3×64×64), in evaluation mode.",
        "Other batch sizes were tried: 2 and 3.",
    ),
    fusions=(
        Fusion("conv_bn", ("stages.0.rbr_dense.conv", "stages.0.rbr_dense.bn"), 64, 65536, 131072),
        Fusion("linear_bn", ("[head]", "norm"), -1200, None, None),
    ),
    skips=(
        Skip(
            ("stages.1.rbr_identity",),
            "Its input is the output of an addition, which cannot take a batch norm in.",
            "",
            "conv_bn",
        ),
        Skip(
            ("head.conv", "head.bn"),
            "The output of head.conv is read by an addition as well.",
            "Let the addition read the output of head.bn.",
            "conv_bn",
        ),
    ),
)
EMPTY = FusionPlan("Sequential", ("forward(1×2), in evaluation mode.",), (), ())


@pytest.mark.parametrize(
    ("name", "plan", "width"),
    [("piped", PLAN, None), ("terminal", PLAN, 80), ("nothing", EMPTY, None)],
)
def test_a_plan_reads_as_in_its_golden_file(name: str, plan: FusionPlan, width: int | None) -> None:
    assert text(plan, width) + "\n" == (GOLDEN / f"plan_{name}.txt").read_text(encoding="utf-8")


def test_what_is_saved_is_a_share_of_the_whole() -> None:
    whole = WholeCost(macs=262_144, traffic_bytes=262_144, norms=3, norms_merged=2)
    lines = text(replace(PLAN, whole=whole)).splitlines()
    assert (
        "Of the whole model: 2 of 3 batch norms merged, 25.0 % of the memory traffic and 50.0 % "
        "of the MACs saved."
    ) in lines


def test_str_of_a_plan_has_one_line_per_row() -> None:
    lines = str(PLAN).splitlines()
    for entry in (*PLAN.fusions, *PLAN.skips):
        assert any(" + ".join(entry.modules) in line for line in lines)


def test_no_line_is_wider_than_the_terminal() -> None:
    assert max(map(len, text(PLAN, 80).splitlines())) <= 80


def test_module_names_are_not_taken_for_markup() -> None:
    assert "[head] + norm" in text(PLAN)


def test_the_cost_of_kept_originals_is_printed() -> None:
    assert "Originals kept for unfuse: 1.23 MB" in text(replace(PLAN, originals_bytes=1_234_567))
    assert "Originals" not in text(replace(PLAN, originals_bytes=0))


def test_unknown_is_a_question_mark_and_zero_is_zero() -> None:
    zero = FusionPlan("Net", (), (Fusion("conv_bn", ("a", "b"), 0, 0, None),), ())
    row = next(line for line in text(zero).splitlines() if "a + b" in line)
    assert row.split()[-4:] == ["0", "0", "B", "?"]


def test_skips_for_one_reason_are_one_row() -> None:
    def skip(i: int, reader: str) -> Skip:
        names = (f"blocks.{i}.conv", f"blocks.{i}.bn")
        reason = f"The output of `blocks.{i}.conv` is also read by another use: {reader}."
        return Skip(names, reason, "Let the other use read the batch norm's output.", "conv_bn")

    skips = (*(skip(i, "add") for i in range(52)), skip(99, "mul"))
    shown = text(replace(EMPTY, skips=skips))
    assert "53 not fused" in shown
    assert shown.count("is also read by another use") == 2
    assert "blocks.3.conv + blocks.3.bn" in shown
    assert "and 48 more" in shown
    assert "The output of `…` is also read by another use: add." in shown
    assert "The output of `blocks.99.conv` is also read by another use: mul." in shown


def test_skips_for_one_reason_are_one_row_whatever_block_they_are_in() -> None:
    skips = tuple(
        Skip(
            (f"blocks.{i}.conv", f"blocks.{i}.bn"),
            f"The output of `blocks.{i}.conv` is also read by another use: add in `blocks.{i}`.",
            "",
            "conv_bn",
        )
        for i in range(52)
    )
    shown = text(replace(EMPTY, skips=skips))
    assert "The output of `…` is also read by another use: add in `…`." in shown
    assert "and 48 more" in shown


def test_the_model_itself_has_a_name() -> None:
    skip = Skip(("",), "Its class is to stay.", "", "branches")
    assert "the model itself" in text(replace(PLAN, skips=(skip,)))
