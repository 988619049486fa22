"""What a comparison of outputs says, in the words of what it was judged by."""

import torch

from torchfuse.verifying.outputs import verify

X = torch.linspace(-1, 1, 64)


def noisy(x):
    return x + 0.1 * torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)


def test_outputs_within_rounding_are_equivalent():
    check = verify(lambda x: x, lambda x: x * (1 + 1e-6), X)
    assert str(check).splitlines()[-1] == "equivalent"
    assert str(verify(lambda x: x, noisy, X)).splitlines()[-1] == "NOT equivalent"


def test_outputs_judged_by_their_noise_alone_are_not_called_equivalent():
    check = verify(lambda x: x, noisy, X, min_sqnr_db=14)
    assert check.passed
    assert check.min_sqnr_db == 14
    assert check.verdict == "within the bound: SQNR 15.4 dB, at least 14.0 dB asked for"
    assert "equivalent" not in str(check)


def test_noise_above_the_bound_is_said_with_the_bound():
    check = verify(lambda x: x, noisy, X, min_sqnr_db=20)
    assert check.verdict == "NOT within the bound: SQNR 15.4 dB, at least 20.0 dB asked for"


def test_outputs_that_cannot_be_compared_are_not_within_a_bound():
    check = verify(lambda x: x, lambda x: x[:1], X, min_sqnr_db=20)
    assert check.verdict == "NOT within the bound: at least 20.0 dB asked for"


def test_equal_outputs_are_called_so_whatever_the_bound():
    assert verify(lambda x: x, lambda x: x, X, min_sqnr_db=20).verdict == "equal"


def test_outputs_within_rounding_and_a_noise_bound_are_equivalent():
    check = verify(lambda x: x, lambda x: x * (1 + 1e-6), X, rtol=1e-5, min_sqnr_db=60)
    assert (check.verdict, check.min_sqnr_db) == ("equivalent", None)
