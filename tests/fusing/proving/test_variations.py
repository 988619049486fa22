"""Other inputs like the given ones."""

from typing import Any

import pytest
import torch

from torchfuse.cases import Case
from torchfuse.fusing.proving import other_inputs, variations


def test_other_inputs_have_the_spread_and_the_centre_of_the_given_ones() -> None:
    given = torch.randn(4, 1000) * 3 + 7
    (other,) = other_inputs(Case((given,)), seed=1).args
    assert other.shape == given.shape
    assert other.dtype == given.dtype
    assert not torch.equal(other, given)
    assert other.mean() == pytest.approx(7, abs=0.2)
    assert other.std() == pytest.approx(3, abs=0.1)


def test_constant_inputs_become_others_that_are_hardly_spread() -> None:
    (other,) = other_inputs(Case((torch.full((1000,), 5.0),)), seed=1).args
    assert other.std() == pytest.approx(1e-3, rel=0.2)
    assert other.mean() == pytest.approx(5, abs=1e-2)


def test_other_integers_are_the_given_ones_in_another_order() -> None:
    given = torch.arange(50).reshape(5, 10)
    (other,) = other_inputs(Case((given,)), seed=1).args
    assert other.shape == given.shape
    assert not torch.equal(other, given)
    assert torch.equal(other.flatten().sort().values, given.flatten())


def test_other_seeds_give_other_inputs_and_the_same_the_same() -> None:
    case = Case((torch.randn(8),))
    (a,), (b,), (c,) = (other_inputs(case, seed).args for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_tensors_inside_containers_become_others_and_the_rest_is_copied() -> None:
    words = ["a"]
    given = {"x": torch.randn(8), "rest": (torch.randn(2), words), "empty": torch.zeros(0)}
    case = other_inputs(Case((given,), {"scale": 2.0}, "encode"), seed=1)
    (other,) = case.args
    assert not torch.equal(other["x"], given["x"])
    assert type(other["rest"]) is tuple
    assert other["rest"][1] == words
    assert other["rest"][1] is not words
    assert other["empty"].shape == (0,)
    assert (dict(case.kwargs), case.method) == ({"scale": 2.0}, "encode")
    assert not other["x"].requires_grad


def test_sparse_inputs_are_copied() -> None:
    given = torch.eye(3).to_sparse()
    (other,) = other_inputs(Case((given,)), seed=1).args
    assert torch.equal(other.to_dense(), torch.eye(3))
    assert other is not given


def shapes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: shapes(entry) for key, entry in value.items()}
    return type(value)(map(shapes, value)) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # other values; another batch at half the size; another batch
        ((4, 3, 8, 9), [(4, 3, 8, 9), (3, 3, 4, 4), (3, 3, 8, 9)]),
        ((1, 3, 8, 8), [(1, 3, 8, 8), (2, 3, 4, 4), (2, 3, 8, 8)]),
        ((2, 5, 1), [(2, 5, 1), (1, 5, 1)]),
        ((6, 5), [(6, 5), (5, 5)]),
        ((5,), [(5,)]),
        ((0, 3), [(0, 3)]),
    ],
)
def test_images_are_varied_in_values_batch_and_size(
    given: tuple[int, ...], expected: list[tuple[int, ...]]
) -> None:
    case = Case((torch.randn(given),))
    assert [shapes(other.args[0]) for other in variations(case)] == expected


def test_all_inputs_of_a_call_are_of_the_other_size() -> None:
    case = Case((torch.randn(2, 3, 8),), {"ids": torch.ones(2, 3, 8, dtype=torch.long), "n": [1]})
    _, half, batch = variations(case)
    assert shapes(half.args) == ((1, 3, 4),)
    assert shapes(dict(half.kwargs)) == {"ids": (1, 3, 8), "n": [1]}  # no picture
    assert shapes(dict(batch.kwargs)) == {"ids": (1, 3, 8), "n": [1]}


def test_no_values_come_again_at_another_batch_size() -> None:
    values, batch = (other.args[0] for other in variations(Case((torch.randn(9, 1000),))))
    both = torch.stack([values[:8].flatten(), batch.flatten()])
    assert torch.corrcoef(both)[0, 1].abs() < 0.1
