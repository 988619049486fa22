"""A comparison as data: it prints as a table, and comes back from JSON as it was."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest

from torchfuse.comparing.comparison import (
    FOLDED,
    NOT_FUSED,
    Answers,
    ChangedAnswer,
    Comparison,
    Row,
)
from torchfuse.delegation import Conversion, Delegation, OperatorDelegation
from torchfuse.errors import InputError
from torchfuse.measuring.cautions import Caution
from torchfuse.measuring.timing import FileFacts, Measurement
from torchfuse.stats import Ratio, Share, share_of
from torchfuse.verifying.equivalence import Equivalence, OutputDifference

SPREAD = Caution("spread", "too wide; give more runs", fails=True, name="a")
EQUAL = Equivalence((OutputDifference("output", 0.0, 0.0, math.inf, True),))
OTHER = Equivalence(
    (
        OutputDifference("case 1: output", 0.5, math.inf, -math.inf, False, "differs."),
        OutputDifference("case 2: output", None, None, None, False, "the shape became [1]."),
    ),
    min_sqnr_db=14.5,
)
EAGER = Row(
    NOT_FUSED,
    "eager",
    "fp32",
    Measurement("a", (0.1, 0.25, 0.3), 4, True, 1, "r", 3, None, (SPREAD,), 0.5),
    Ratio(1.0, None, None),
    None,
    EQUAL,
    Share(0.25),
    None,
    Answers(4, math.inf, share_of(3, 4), None, (ChangedAnswer("sample 1", 0, 2, None),)),
)
FILE = Row(
    FOLDED,
    ".pte",
    "int8",
    Measurement("b", (0.1,), 4, None, None, file=FileFacts(10, "ab", 0.1, None, 5, 7, 0.0)),
    Ratio(2.0, 1.5, 2.5, 0.9),
    1234,
    OTHER,
    None,
    Delegation(
        "XNNPACK",
        2,
        (OperatorDelegation("conv", 1, 1, 9, 3, 4, ("no kernel",)),),
        100,
        (Conversion(("gelu (act)",), 8),),
    ),
)
COMPARISON = Comparison("Net", (EAGER, FILE), ("left out: fp16",), "x86_64")


def test_a_comparison_comes_back_from_json_as_it_was():
    assert Comparison.from_json(COMPARISON.to_json()) == COMPARISON
    assert Comparison.from_json(replace(COMPARISON, rows=()).to_json()).rows == ()


def test_its_json_is_strict():
    def refused(constant):
        raise AssertionError(constant)

    saved = json.loads(COMPARISON.to_json(), parse_constant=refused)
    assert saved["format"] == "torchfuse-comparison-2"
    assert saved["rows"][0]["latency"]["samples_s"] == [0.1, 0.25, 0.3]
    assert "Infinity" not in COMPARISON.to_json()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "[]",
        '{"format": "torchfuse-plan-1"}',
        '{"format": "torchfuse-comparison-2", "model": "Net", "rows": [{}], "notes": []}',
        COMPARISON.to_json()[:-20],
        COMPARISON.to_json().replace('"spread"', '"mood"'),
    ],
)
def test_text_that_is_no_comparison_is_one_sentence(text):
    with pytest.raises(InputError, match=r"Expected what Comparison\.to_json\(\) writes") as caught:
        Comparison.from_json(text)
    assert "\n" not in str(caught.value)


def test_it_prints_as_the_table_and_not_as_its_fields():
    shown = str(COMPARISON)
    assert shown.startswith("variant")
    assert "Row(" not in shown
    assert shown.splitlines()[-1] == "Warning: a: too wide; give more runs."
    assert COMPARISON.to_markdown().startswith("| variant | target |")


def test_reading_and_printing_one_needs_no_torch(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(COMPARISON.to_json())
    code = (
        "import sys; from pathlib import Path\n"
        "from torchfuse.comparing.comparison import Comparison\n"
        "print(Comparison.from_json(Path(sys.argv[1]).read_text()));"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, path], check=True, stdout=subprocess.PIPE)
    assert done.stdout.decode() == f"{COMPARISON}\n"
