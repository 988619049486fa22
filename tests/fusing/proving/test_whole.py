"""The whole before and after: float32 first, then float64, then what rounding explains."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from torchfuse.cases import Case
from torchfuse.fusing.proving import Whole, prove

CASES = (Case((torch.full((3,), 1.5),)), Case((torch.full((2,), 1.25),), {"more": [1, 2]}))
Error = Callable[[Tensor], float]


class Model:
    """Returns `function` of its input; each match that is fused adds an error of its own."""

    def __init__(
        self,
        errors: dict[str, float | Error],
        function: Callable[[Tensor], Tensor] = torch.ones_like,
    ) -> None:
        self.errors, self.function = errors, function
        self.ran: list[tuple[tuple[str, ...], int]] = []  # the matches, and the size of the input

    def outputs(self, matches: Sequence[str], cases: Sequence[Case]) -> list[dict[str, Any]]:
        return [{"output": self.run(matches, *case.args)} for case in cases]

    def run(self, matches: Sequence[str], x: Tensor) -> Tensor:
        self.ran.append((tuple(matches), len(x)))
        output = self.function(x)
        for match in matches:
            error = self.errors[match]
            output = output + (error(x) if callable(error) else error)
        return output


def no_float64() -> Model:
    raise RuntimeError("expected scalar type Float")


def proved(model: Model, in_float64: Callable[[], Model] = no_float64) -> Whole[str]:
    expected = model.outputs([], CASES)
    model.ran.clear()
    return prove(model, list(model.errors), CASES, expected, in_float64)


def test_what_float32_settles_is_not_asked_of_float64() -> None:
    asked: list[bool] = []
    model = Model({"a": 1e-5, "b": 2e-5})
    whole = proved(model, lambda: asked.append(True) or no_float64())  # type: ignore[func-returns-value]
    assert (whole.kept, whole.refused, whole.decided) == (["a", "b"], [], True)
    assert whole.check.passed
    assert whole.check.max_abs == pytest.approx(3e-5, rel=0.01)
    assert not asked
    assert model.ran == [(("a", "b"), 3), (("a", "b"), 2)]


def test_where_float32_differs_float64_decides() -> None:
    wide = Model({"a": 0.0})
    whole = proved(Model({"a": 1e-3}), lambda: wide)
    assert (whole.kept, whole.decided, whole.check.passed) == (["a"], True, True)
    assert whole.check.max_abs == 0  # the figure that decided
    assert wide.ran == [((), 3), ((), 2), (("a",), 3), (("a",), 2)]


def test_only_the_cases_that_differ_are_run_in_float64() -> None:
    def on_the_second(x: Tensor) -> float:
        return 1e-3 if len(x) == 2 else 1e-6

    wide = Model({"a": 1e-12})
    whole = proved(Model({"a": on_the_second}), lambda: wide)
    assert whole.kept == ["a"]
    assert wide.ran == [((), 2), (("a",), 2)]
    first, second = whole.check.outputs
    assert (first.name, second.name) == ("case 1: output", "case 2: output")
    assert first.max_abs == pytest.approx(1e-6, rel=0.1)
    assert second.max_abs == pytest.approx(1e-12, rel=0.1)


@pytest.mark.parametrize("wrong", [["a"], ["c"], ["e"], ["a", "d"], ["b", "c"], list("abcde")])
def test_what_is_wrong_in_float64_is_found_by_halving(wrong: list[str]) -> None:
    errors = {name: 1e-3 if name in wrong else 1e-11 for name in "abcde"}
    whole = proved(Model(dict.fromkeys("abcde", 1e-3)), lambda: Model(errors))
    assert whole.refused == wrong
    assert whole.kept == [name for name in "abcde" if name not in wrong]
    assert whole.check.passed


def test_a_match_that_is_wrong_on_one_case_is_refused() -> None:
    wide = Model({"a": lambda x: 1e-3 if len(x) == 2 else 0.0, "b": 0.0})
    whole = proved(Model({"a": 1e-3, "b": 1e-3}), lambda: wide)
    assert (whole.kept, whole.refused) == (["b"], ["a"])


def test_a_case_that_float32_settles_for_all_matches_is_settled_anew_without_some() -> None:
    def narrow(x: Tensor) -> float:
        return -0.5 if len(x) == 3 else 1e-3

    # On the first case the two cancel; without the wrong one they do not.
    model = Model({"a": lambda x: 0.5 if len(x) == 3 else 0.0, "b": narrow})
    wide = Model({"a": 0.0, "b": lambda x: 1e-3 if len(x) == 2 else 0.0})
    whole = proved(model, lambda: wide)
    assert (whole.kept, whole.refused, whole.check.passed) == (["a"], ["b"], True)
    assert whole.check.outputs[0].max_abs == 0  # decided in float64


AMPLIFIED = 2.0**30
ONE_STEP = AMPLIFIED * 2.0**-52  # what one step of a float64 between 1 and 2 becomes


def amplifying(x: Tensor) -> Tensor:
    return (x - x.round(decimals=2)) * (AMPLIFIED if x.dtype is torch.float64 else 2.0**8) + 1


@pytest.mark.parametrize(("steps", "right"), [(1, True), (100, True), (101, False)])
def test_a_model_that_amplifies_rounding_may_move_by_100_roundings_of_its_inputs(
    steps: int, right: bool
) -> None:
    wide = Model({"a": steps * ONE_STEP}, amplifying)
    whole = proved(Model({"a": 0.5}, amplifying), lambda: wide)
    assert whole.kept == ["a"] * right
    assert whole.refused == ["a"] * (not right)
    assert whole.check.passed
    assert whole.decided


def test_how_far_rounding_moves_the_outputs_is_measured_only_where_that_matters() -> None:
    wide = Model({"a": lambda x: 50 * ONE_STEP if len(x) == 2 else 0.0}, amplifying)
    proved(Model({"a": 0.5}, amplifying), lambda: wide)
    assert [entry for entry in wide.ran if not entry[0]] == [((), 3), ((), 2), ((), 2), ((), 2)]


@pytest.mark.parametrize(("steps", "right"), [(100, True), (101, False)])
def test_without_float64_what_rounding_explains_is_kept_and_the_scope_is_to_say_so(
    steps: int, right: bool
) -> None:
    step = 2.0**8 * 2.0**-23
    whole = proved(Model({"a": steps * step}, amplifying))
    assert whole.kept == ["a"] * right
    assert whole.check.passed
    assert not whole.decided


def test_without_float64_a_difference_that_rounding_does_not_explain_is_refused() -> None:
    whole = proved(Model({"a": 1e-6, "b": 1e-3}))
    assert (whole.kept, whole.refused) == (["a"], ["b"])
    assert whole.check.passed


def test_a_model_that_runs_in_float64_only_in_part_is_judged_without() -> None:
    def breaks(x: Tensor) -> Tensor:
        if x.dtype is torch.float64:
            raise RuntimeError("expected scalar type Float")
        return torch.ones_like(x)

    model = Model({"a": 1e-3}, breaks)
    assert not proved(model, lambda: model).decided


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_float64_always_decides(dtype: torch.dtype) -> None:
    def half(x: Tensor) -> Tensor:
        return torch.ones_like(x, dtype=dtype)

    wrong = proved(Model({"a": 5e-3}, half), lambda: Model({"a": 5e-3}))
    assert wrong.refused == ["a"]
    right = proved(Model({"a": 5e-3}, half), lambda: Model({"a": 0.0}))
    assert right.kept == ["a"]
    assert right.check.max_abs is not None
    assert right.check.max_abs > 0  # what was asked about is the model in its own dtype


def test_a_match_with_which_the_model_fails_is_refused() -> None:
    def fails(_: Tensor) -> float:
        raise ValueError("no")

    whole = proved(Model({"a": 0.0, "b": fails}), lambda: Model({"a": 0.0, "b": fails}))
    assert (whole.kept, whole.refused, whole.check.passed) == (["a"], ["b"], True)


def test_a_model_that_differs_from_itself_keeps_nothing_and_does_not_pass() -> None:
    calls = iter(range(1000))
    whole = proved(Model({"a": 0.0}, lambda x: torch.ones_like(x) * next(calls)))
    assert (whole.kept, whole.refused) == ([], ["a"])
    assert not whole.check.passed


def test_equal_infinities_do_not_stop_a_match() -> None:
    def masked(x: Tensor) -> Tensor:
        return torch.where(torch.arange(len(x)) == 1, -torch.inf, 1.0)

    assert proved(Model({"a": 1e-6}, masked)).kept == ["a"]
    assert proved(Model({"a": 1e-3}, masked)).kept == []


def test_inputs_that_are_no_finite_real_numbers_are_not_moved() -> None:
    seen: list[Any] = []

    class Keeps(Model):
        def outputs(self, matches: Sequence[str], cases: Sequence[Case]) -> list[dict[str, Any]]:
            seen.extend((case.args, case.kwargs) for case in cases)
            return super().outputs(matches, [Case((case.args[0]["x"][0],)) for case in cases])

    x = torch.tensor([1.5, torch.inf, -torch.inf, -1.5])
    case = Case(({"x": (x, torch.arange(3), "text")},), {"mask": [torch.tensor([True])]})
    model = Keeps({"a": 1e-2})
    expected = model.outputs([], [case])
    seen.clear()
    prove(model, ["a"], [case], expected, no_float64)
    (moved, integers, text), keywords = next(
        (args[0]["x"], kwargs) for args, kwargs in seen if not torch.equal(args[0]["x"][0], x)
    )
    assert torch.equal((moved - x).abs()[[0, 3]], torch.full((2,), 2.0**-23))
    assert torch.equal(moved[1:3], x[1:3])
    assert torch.equal(integers, torch.arange(3))
    assert text == "text"
    assert torch.equal(keywords["mask"][0], torch.tensor([True]))
