import collections
import io
import math

import pytest
import torch
from torch import nn

from torchfuse.cases import Case
from torchfuse.errors import InputError
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.verifying.outputs import tolerance, verify

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def scaled(factor):
    return lambda x: x * factor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_scale_that_is_1_percent_off_fails(dtype):
    check = verify(scaled(1.0), scaled(1.01), torch.randn(4, 4).to(dtype))
    assert not check.passed
    assert check.max_rel == pytest.approx(0.01, rel=1e-4)
    assert check.sqnr_db == pytest.approx(40, rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_once_in_the_dtype_passes(dtype):
    x = torch.randn(64).to(dtype)
    assert verify(lambda x: x * 3, lambda x: x / (1 / 3), x).passed


@pytest.mark.parametrize("dtype", DTYPES)
def test_just_beyond_the_tolerance_of_the_dtype_fails(dtype):
    x = torch.ones(4, dtype=dtype)
    assert not verify(scaled(1.0), scaled(1 + 1.5 * tolerance(dtype)), x).passed


@pytest.mark.parametrize(
    ("reference", "candidate", "problem"),
    [
        (lambda x: x / 0, lambda x: x / 0, "reference has NaN or Inf"),
        (lambda x: x, lambda x: x / 0 * 0, "candidate has NaN or Inf"),
        (lambda x: x, lambda x: x[:1], r"shape \[3\] became \[1\]"),
        (lambda x: x, lambda x: x.double(), "dtype torch.float32 became torch.float64"),
        (lambda x: (x, x), lambda x: (x,), "does not return it"),
        (lambda x: {"a": x}, lambda x: {"a": x, "b": x}, "only the candidate returns it"),
        (lambda x: (x, "left"), lambda x: (x, "right"), "'left' became 'right'"),
        (lambda x: x > 0, lambda x: x < 0, "differs by up to 1; at most 0"),
        (lambda x: 3, lambda x: 4, "differs by up to 1; at most 0"),
    ],
)
def test_what_cannot_be_equal_fails_and_says_why(reference, candidate, problem):
    check = verify(reference, candidate, torch.ones(3))
    assert not check.passed
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(" ".join(check.problems))


def test_nothing_compared_is_not_passed():
    assert not verify(lambda x: (), lambda x: (), torch.ones(1)).passed


def test_outputs_are_named_by_their_path():
    Pair = collections.namedtuple("Pair", "left right")

    def model(x):
        return {"logits": [x, x], "pair": Pair(x, x)}

    names = [o.name for o in verify(model, model, torch.ones(1)).outputs]
    assert names == [
        "output['logits'][0]",
        "output['logits'][1]",
        "output['pair'].left",
        "output['pair'].right",
    ]


def test_cases_are_named_when_there_are_several():
    check = verify(scaled(1), scaled(1), [torch.ones(1), (torch.ones(2),), {"x": torch.ones(3)}])
    assert [o.name for o in check.outputs] == [f"case {i}: output" for i in (1, 2, 3)]


def test_the_worst_output_counts():
    def candidate(x):
        return x + 1e-6, x + 1.0

    check = verify(lambda x: (x, x), candidate, torch.ones(8))
    assert check.max_abs == 1.0
    assert check.sqnr_db == pytest.approx(0.0, abs=1e-9)
    assert [o.passed for o in check.outputs] == [True, False]


def test_only_an_asked_for_sqnr_decides():
    x = torch.randn(100)
    assert verify(scaled(1.0), scaled(1.01), x, min_sqnr_db=39).passed
    refused = verify(scaled(1.0), scaled(1.01), x, min_sqnr_db=41)
    assert not refused.passed
    assert "40.0 dB; at least 41.0 dB" in refused.problems[0]


def test_rtol_and_atol_add_up():
    x = torch.full((3,), 10.0)
    assert verify(lambda x: x, lambda x: x + 1.4, x, rtol=0.1, atol=0.5).passed
    assert not verify(lambda x: x, lambda x: x + 1.6, x, rtol=0.1, atol=0.5).passed


@pytest.mark.parametrize("bound", [-1.0, math.nan])
def test_a_tolerance_that_makes_no_sense_is_refused(bound):
    with pytest.raises(InputError, match="rtol must be a number of at least 0"):
        verify(scaled(1), scaled(1), torch.ones(1), rtol=bound)


def test_both_sides_see_the_same_random_numbers_and_inputs():
    dropout = nn.Dropout(0.5).train()
    assert verify(dropout, dropout, torch.ones(100)).max_abs == 0
    assert verify(lambda x: x.add_(1), lambda x: x.add_(1), torch.ones(3)).max_abs == 0


def test_another_method_can_be_compared():
    class Model(nn.Module):
        def encode(self, x, scale=1.0):
            return x * scale

    case = Case((torch.ones(2),), {"scale": 2.0}, method="encode")
    assert verify(Model(), Model(), case).passed


def test_both_models_are_left_as_they_were():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)
            self.calls = 0
            self.seen = []

        def forward(self, x):
            self.calls += 1
            self.seen.append(x)
            return self.bn(x)

    model = Counting().train()
    x = torch.randn(4, 3)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert verify(model, model, x).passed
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.calls == 0
    assert model.seen == []
    assert torch.equal(torch.get_rng_state(), state)


class Counting(nn.Module):
    """Writes to one buffer in place, and puts another tensor in place of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("first", torch.zeros(()))
        self.register_buffer("second", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.first += 1
        self.second = self.second + 1
        return self.inner(x) + self.first + self.second


def test_scripted_and_loaded_models_can_be_compared_and_are_left_as_they_were():
    model = Counting().eval()
    with known_warnings_ignored():
        scripted = torch.jit.script(model)
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
        buffer.seek(0)
        loaded = torch.jit.load(buffer)
    for candidate in (scripted, loaded):
        assert verify(model, candidate, torch.ones(2, 3)).passed
        assert candidate.first == candidate.second == 0
