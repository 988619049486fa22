"""Results as JSON: every number is one, and comes back as it was."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from torchfuse.errors import InputError
from torchfuse.serialization import from_json, parsed, to_json


@dataclass(frozen=True)
class Inner:
    path: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    sqnr_db: float | None
    inner: Inner | None = None


def strict(text):
    """JSON as its definition has it, without Python's NaN and Infinity."""

    def refused(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refused)


@pytest.mark.parametrize("value", [math.inf, -math.inf, 0.0, -12.5, 1e300, None])
def test_a_figure_is_a_number_in_json_and_comes_back_as_it_was(value):
    result = Result(value, Inner("a", (value or 0.0, 1.0)))
    assert from_json(Result, to_json(result)) == result
    strict(to_json(result))


def test_an_infinite_figure_is_above_every_bound_for_whoever_reads_the_json():
    assert strict(to_json(Result(math.inf)))["sqnr_db"] == sys.float_info.max
    assert strict(to_json(Result(-math.inf)))["sqnr_db"] == -sys.float_info.max


def test_what_is_no_number_is_unknown():
    assert strict(to_json(Result(math.nan))) == {"sqnr_db": None, "inner": None}


def test_lists_dicts_and_paths_are_written_too():
    assert strict(to_json({"a": [Result(None)], "folder": Path("out")})) == {
        "a": [{"sqnr_db": None, "inner": None}],
        "folder": "out",
    }


def test_the_format_is_said_and_looked_at():
    text = to_json(Result(1.0), "torchfuse-result-1")
    assert from_json(Result, text, "torchfuse-result-1") == Result(1.0)
    with pytest.raises(InputError, match="its format is 'torchfuse-result-1'"):
        from_json(Result, text, "torchfuse-result-2")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("[]", "it has no format"),
        ('{"format": "r"}', "missing required field `sqnr_db`"),
        (
            '{"format": "r", "sqnr_db": "much"}',
            r"Expected `float \| null`, got `str` - at `\$\.sqnr_db`",
        ),
        ("[" * 100_000, "recursion"),
    ],
)
def test_something_else_is_one_sentence(text, reason):
    with pytest.raises(InputError, match=rf"Expected what Result.to_json\(\) writes .*{reason}"):
        from_json(Result, text, "r")


def test_fields_that_a_result_does_not_have_are_left_out():
    assert parsed(Result, '{"sqnr_db": 1, "median": 2}') == Result(1.0)
