"""What static int8 simulates is what XNNPACK runs: moved and clamped values keep their range."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchfuse
from torchfuse.quantizing import quantize
from torchfuse.quantizing.training import convert_qat, prepare_qat

Operation = Callable[[Tensor], Tensor]


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Between(nn.Module):
    """A convolution, an operation on what it makes, `[N, 16, 8, 8]`, and another convolution."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.operation = operation
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        with torch.no_grad():  # so that a part has another range than the whole
            self.first.weight.mul_(torch.linspace(0.2, 3, 16).reshape(-1, 1, 1, 1))
        self.last = nn.Conv2d(operation(torch.zeros(1, 16, 8, 8)).shape[1], 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(self.operation(self.first(x)))
        return made


def shuffled(y: Tensor) -> Tensor:
    a, b = y.chunk(2, 1)
    y = torch.cat([a, F.relu(b)], 1).view(1, 2, 8, 8, 8)
    return y.transpose(1, 2).reshape(1, 16, 8, 8) + 1.0


class SideBySide(nn.Module):
    """Each operation in a network of its own, so that none has a part in another's ranges."""

    def __init__(self, operations: dict[str, Operation]) -> None:
        super().__init__()
        self.names = list(operations)
        self.networks = nn.ModuleList(map(Between, operations.values()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: net(x) for name, net in zip(self.names, self.networks, strict=True)}


DATA = [image(1, 3, 8, 8, seed=seed) for seed in range(8)]
OPERATIONS: dict[str, dict[str, Operation]] = {
    "slices": {
        "channels": lambda y: y[:, :8] + y[:, 8:],
        "rows": lambda y: y[:, :, :4] * y[:, :, 4:],
        "narrow": lambda y: y.narrow(1, 0, 8) + y.narrow(1, 8, 8),
        "concatenated": lambda y: torch.cat([y[:, :4], F.relu(y[:, 4:])], 1),
        "after a dropout": lambda y: F.dropout(y, 0.5, False)[:, :8] + 1.0,
        "after a ReLU": lambda y: F.relu(y)[:, :8] + y[:, 8:],
        "after a hardswish": lambda y: F.hardswish(y)[:, :8] + y[:, 8:],
    },
    "splits": {
        "chunk": lambda y: torch.add(*y.chunk(2, 1)),
        "split": lambda y: torch.mul(*y.split([8, 8], 1)),
        "split by size": lambda y: torch.mul(*y.split(4, dim=2)),
        "tensor_split": lambda y: torch.add(*y.tensor_split(2, -1)),
        "shuffled channels": shuffled,
    },
    "moves": {
        "padding": lambda y: F.pad(y[:, :8], (1, 1, 1, 1)) + 1.0,
        "padding with a value out of range": lambda y: F.pad(y, (1, 1), value=50.0) * 2.0,
        "transpose": lambda y: y.transpose(2, 3)[:, :8] + y[:, 8:],
        "permute": lambda y: (y[:, :8].permute(0, 2, 3, 1) * 2.0).permute(0, 3, 1, 2),
        "view": lambda y: (y.view(1, 32, 4, 8)[:, :16] * 3.0).view(1, 8, 8, 8),
        "flatten": lambda y: (y.flatten(2)[:, :, :32] + 1.0).unflatten(2, (4, 8)),
        "unsqueeze": lambda y: (y[:, :8].unsqueeze(-1) * y[:, 8:].unsqueeze(-1)).squeeze(-1),
        "select": lambda y: (y[:, :, 0] + y[:, :, 1]).unsqueeze(2),
    },
    "clamps": {
        "ReLU in place": lambda y: F.max_pool2d(y, 2).relu_() + 1.0,
        "ReLU6": lambda y: F.relu6(F.max_pool2d(y * 20.0, 2)) + 1.0,
        "clamp": lambda y: F.max_pool2d(y * 20.0, 2).clamp(-2, 2) + 1.0,
        "clamp from below": lambda y: F.max_pool2d(y * 20.0, 2).clamp(min=0) + 1.0,
    },
}


@pytest.mark.filterwarnings("ignore::torchfuse.delegation.DelegationWarning")  # select, squeeze
@pytest.mark.parametrize("kind", OPERATIONS)
def test_values_that_an_operator_moves_or_clamps_keep_their_range_in_the_program(
    kind: str, tmp_path: Path
) -> None:
    result = quantize(SideBySide(OPERATIONS[kind]).eval(), DATA[0], DATA)
    assert all(layer.int8 for layer in result.layers)
    run = torchfuse.load(torchfuse.export(result.model, DATA[0], tmp_path / "model.pte").path)
    found = torchfuse.verify(result.model, run, DATA, min_sqnr_db=35)
    assert found.passed, found.problems


def test_values_that_a_trained_model_moves_keep_their_range_in_the_program(tmp_path: Path) -> None:
    training = prepare_qat(Between(OPERATIONS["slices"]["channels"]), DATA[0])
    for x in DATA:
        training(x)
    int8 = convert_qat(training).model
    run = torchfuse.load(torchfuse.export(int8, DATA[0], tmp_path / "model.pte").path)
    assert torchfuse.verify(int8, run, DATA, min_sqnr_db=35)
