"""What a model is judged by: the user's own measure, top-1, agreement; or an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchfuse.cases import Case
from torchfuse.errors import InputError
from torchfuse.quantizing.metrics import measures, outputs_of, sqnr_of_outputs

DATA = [Case((torch.eye(4)[i : i + 1],)) for i in range(4)]


def classifier() -> nn.Module:
    """Says class i for the i-th of the data."""
    model = nn.Linear(4, 4, bias=False).eval()
    with torch.no_grad():
        model.weight.copy_(torch.eye(4))
    return model


def found(
    labels: Any = None, evaluate: Callable[[nn.Module], float] | None = None
) -> dict[str, float]:
    model = classifier()
    outputs = outputs_of(model, DATA)
    return {
        measure.name: measure.of(model, outputs)
        for measure in measures(DATA, outputs, labels, evaluate)
    }


def test_a_classifier_is_measured_by_agreement_with_the_float_model() -> None:
    assert found() == {"agreement": 100.0}


def test_labels_may_be_a_list_or_a_tensor() -> None:
    assert found([0, 1, 2, 0]) == {"top-1": 75.0, "agreement": 100.0}
    assert found(torch.tensor([3, 1, 2, 0])) == {"top-1": 50.0, "agreement": 100.0}


def test_the_users_own_measure_comes_first() -> None:
    def mean_precision(model: nn.Module) -> Tensor:
        return torch.tensor([0.5])

    assert list(found([0, 1, 2, 3], mean_precision)) == ["mean_precision", "top-1", "agreement"]
    assert found(evaluate=mean_precision)["mean_precision"] == 0.5


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], "an integer label for each of the 4 calibration samples, got 2 of torch.int64"),
        ([0.0, 1.0, 2.0, 3.0], "integer label .* got 4 of torch.float32"),
        (torch.eye(4), "integer label .* got 4×4 of torch.float32"),
        (["a", "b", "c", "d"], "Expected labels as integers, got list"),
        ([0, 1, 2, 4], "labels of 0 to 3, since the model tells 4 classes apart, got 0 to 4"),
        ([-1, 1, 2, 3], "got -1 to 3"),
    ],
)
def test_labels_that_do_not_fit_are_an_error(labels: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        found(labels)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"Expected returned to return a number of which more is better, got NoneType"),
        ("0.5 mAP", "to return a number of .* got str"),
        (torch.ones(2), "to return a number of .* got Tensor"),
        (float("nan"), "to return a finite number, got nan"),
    ],
)
def test_a_measure_that_is_no_number_is_an_error(value: Any, message: str) -> None:
    def returned(model: nn.Module) -> Any:
        return value

    with pytest.raises(InputError, match=message):
        found(evaluate=returned)


def test_labels_of_a_model_without_scores_are_an_error() -> None:
    model = nn.Flatten(0).eval()
    with pytest.raises(InputError, match="Labels are for a model that returns one tensor of"):
        measures(DATA, outputs_of(model, DATA), [0, 1, 2, 3], None)
    assert measures(DATA, outputs_of(model, DATA), None, None) == []


def test_the_noise_of_all_outputs_is_one_ratio() -> None:
    expected = [[torch.tensor([10.0]), torch.tensor([3])], [torch.tensor([0.0])]]
    got = [[torch.tensor([9.0]), torch.tensor([4])], [torch.tensor([0.0])]]
    assert sqnr_of_outputs(expected, got) == pytest.approx(20.0)
