"""Which layers int8 hurts, by how much, and why."""

import re

import pytest
import torch
from torch import Tensor, nn

from torchfuse.quantizing import quantize


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.query(x), self.key(x).transpose(1, 2))


class Net(nn.Module):
    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        channels = len(factors)
        self.expand = nn.Conv2d(3, channels, 1)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.head = nn.Conv2d(channels, 4, 1)
        with torch.no_grad():
            self.expand.weight.mul_(factors.reshape(-1, 1, 1, 1))
            self.depthwise.weight.div_(factors.reshape(-1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depthwise(torch.relu(self.expand(x))))


def pictures(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 3, 8, 8, generator=generator) for _ in range(count)]


def errors_of(model: nn.Module, data: list[Tensor]) -> dict[str, object]:
    report = quantize(model.eval(), data[0], data, explain=True).report
    assert [e.sqnr_db for e in report.layers] == sorted(e.sqnr_db for e in report.layers)
    return {error.module: error for error in report.layers}


def test_every_layer_has_its_error_the_worst_first() -> None:
    errors = errors_of(Net(torch.ones(8)), pictures(40))
    assert errors.keys() == {"expand", "depthwise", "head"}
    assert all(20 < error.sqnr_db < 60 for error in errors.values())


def test_a_layer_that_is_only_given_noise_is_not_blamed_for_it() -> None:
    errors = errors_of(Net(torch.tensor([1e-3] * 7 + [10.0])), pictures(40))
    assert errors["depthwise"].sqnr_db < 25
    assert errors["head"].sqnr_db < 25
    assert errors["head"].own_sqnr_db > errors["head"].sqnr_db + 10


def test_unbalanced_channels_of_a_depthwise_layer_are_named() -> None:
    errors = errors_of(Net(torch.tensor([1e-3] * 7 + [10.0])), pictures(40))
    assert "unbalanced channels: one range is" in errors["depthwise"].cause


def test_a_product_of_two_activations_has_its_error_too() -> None:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(1, 6, 8, generator=generator) for _ in range(40)]
    errors = errors_of(Attention(), data)
    assert errors.keys() == {"query", "key", ""}
    assert 20 < errors[""].sqnr_db < errors[""].own_sqnr_db < 60


def test_outliers_are_named() -> None:
    data = pictures(40)
    data[3][0, 0, 0, 0] = 300
    errors = errors_of(Net(torch.ones(8)), data)
    found = re.search(r"outliers: its largest input is (\d+)×", errors["expand"].cause)
    ratio = 300 / torch.quantile(torch.cat(data).abs(), 0.999).item()
    assert int(found[1]) == pytest.approx(ratio, rel=0.02)


def test_inputs_that_are_next_to_all_zero_have_no_outliers() -> None:
    data = [torch.zeros(1, 3, 8, 8) for _ in range(40)]
    data[3][0, 0, 0, 0] = 300
    errors = errors_of(Net(torch.ones(8)), data)
    assert errors["expand"].cause == ""


def test_too_few_samples_are_named_where_a_layer_is_bad() -> None:
    errors = errors_of(Net(torch.tensor([1e-3] * 7 + [10.0])), pictures(4))
    assert "few samples: 4" in errors["depthwise"].cause
