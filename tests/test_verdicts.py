"""The table of verdicts is what the code decides, and what differs from it is reported."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import torchfuse
from support.fusing_checks import IMAGE

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # at the end: a benchmark has the name of a package

import verdicts as script  # noqa: E402
from verdict_table import of_model, table  # noqa: E402

SMALL = ("Conformer block", "seed 49", "never_wrong/test_order.py")
BLOCK = """Conformer block
  on forward(1×20×16)
  320 outputs 1.78885e+01 -2.90532e+01 1.16870e+01
  fused conv_bn conv.depthwise + conv.batch_norm
"""


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Return a copy of the table, to be changed."""
    for path in script.TABLES.glob("*.txt"):
        shutil.copy(path, tmp_path)
    return tmp_path


def run(tables: Path, name: str, *options: str) -> int:
    return script.main(["--only", name, "--jobs", "1", "--tables", str(tables), *options])


def edit(tables: Path, old: str, new: str) -> str:
    """Return the text of the table's part that holds `BLOCK`, changed there."""
    path = tables / "coverage.txt"
    text = path.read_text(encoding="utf-8")
    assert text.count(BLOCK) == 1
    assert old in BLOCK
    path.write_text(text.replace(BLOCK, BLOCK.replace(old, new)), encoding="utf-8")
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SMALL)
def test_the_table_is_what_the_code_decides(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(script.TABLES, name) == 0, capsys.readouterr().out
    assert "no differences." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "reported"),
    [
        (
            "fused conv_bn",
            "skipped",
            "conv.batch_norm: skipped conv.depthwise + conv.batch_norm → "
            "fused conv_bn conv.depthwise + conv.batch_norm",
        ),
        (
            "conv.depthwise + conv.batch_norm",
            "conv.pointwise + conv.batch_norm",
            "conv.batch_norm: fused conv_bn conv.pointwise + conv.batch_norm → "
            "fused conv_bn conv.depthwise + conv.batch_norm",
        ),
        (
            "  fused conv_bn conv.depthwise + conv.batch_norm\n",
            "",
            "conv.batch_norm: – → fused conv_bn conv.depthwise + conv.batch_norm",
        ),
        (
            "-2.90532e+01",
            "-2.90600e+01",
            "outputs: 320 values, 1.78885e+01 -2.90600e+01 1.16870e+01 → "
            "320 values, 1.78885e+01 -2.90532e+01 1.16870e+01",
        ),
        ("1×20×16", "1×20×32", "inputs: forward(1×20×32) → forward(1×20×16)"),
        ("  on forward", "  raises FusionError: No.\n  on forward", "raises: FusionError: No. → –"),
        (BLOCK, "", "is not in the table"),
    ],
    ids=["skipped", "another layer", "unknown", "outputs", "inputs", "raises", "missing"],
)
def test_what_is_not_as_in_the_table_is_reported(
    tables: Path, old: str, new: str, reported: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(tables, old, new)
    assert run(tables, "Conformer block") == 1
    assert capsys.readouterr().out == (
        f"coverage Conformer block: {reported}\n1 verdicts, 1 difference.\n"
    )


def test_a_row_whose_model_is_gone_is_reported(
    tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(tables, BLOCK, f"{BLOCK}\n{BLOCK.replace('block', 'block of old')}")
    assert run(tables, "Conformer block") == 1
    assert "coverage Conformer block of old: is in the table only" in capsys.readouterr().out


def test_writing_brings_the_table_back_and_keeps_digits_that_only_rounding_changed(
    tables: Path,
) -> None:
    before = edit(tables, "1.16870e+01", "1.16869e+01")
    path = tables / "coverage.txt"
    damaged = before.replace("fused conv_bn conv.depthwise", "skipped conv.depthwise")
    path.write_text(damaged, encoding="utf-8")
    assert run(tables, "Conformer block", "--write") == 0
    assert path.read_text(encoding="utf-8") == before


@pytest.mark.parametrize("group", script.GROUPS)
def test_the_table_is_as_it_would_be_written(group: str) -> None:
    path = script.TABLES / f"{group}.txt"
    read = table.parse(path)
    assert table.text(read.rows.values(), read.versions) == path.read_text(encoding="utf-8")


def test_a_wrong_fusion_is_an_error_whatever_the_table_says(
    tables: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fuse = torchfuse.fuse

    def nearly(model: nn.Module, inputs: object, **options: object) -> torchfuse.FusionResult:
        result = fuse(model, inputs, **options)
        for parameter in result.model.parameters():
            parameter.data *= 1 + 1e-7  # less than float32 could show
        return result

    monkeypatch.setattr(torchfuse, "fuse", nearly)
    before = edit(tables, "fused conv_bn", "skipped")
    assert run(tables, "Conformer block", "--write") == 1
    assert "coverage Conformer block IS WRONG ONCE FUSED: output differs by" in (
        capsys.readouterr().out
    )
    assert (tables / "coverage.txt").read_text(encoding="utf-8") == before


def test_an_error_is_a_verdict_too() -> None:
    row = of_model.verdicts_of("name", nn.Conv2d(4, 4, 3), IMAGE[:, :3])
    assert row.raised == "CaptureError: Conv2d failed on forward(2×3×8×8): RuntimeError: Given"
    assert row.fused == row.skipped == ()


def test_equal_outputs_have_an_equal_digest_and_others_another() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = of_model.digest([values])
    assert same.agrees(of_model.digest([values[:300], values[300:] * (1 + 1e-9)]))
    assert not same.agrees(of_model.digest([values * 1.001]))
    assert not same.agrees(of_model.digest([values.flip(0)]))
    assert not same.agrees(of_model.digest([-values]))
    assert not same.agrees(of_model.digest([values, torch.zeros(1)]))


def test_a_name_that_nothing_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(script.TABLES, "no such model")
    assert "no group, model or test of the table has 'no such model'" in capsys.readouterr().err


def test_a_damaged_table_is_refused(tables: Path) -> None:
    edit(tables, "320 outputs", "320")
    with pytest.raises(SystemExit, match=r"coverage.txt:\d+ is no line of a table of verdicts"):
        run(tables, "Conformer block")
