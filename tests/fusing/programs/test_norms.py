"""A captured model has no batch norm left and computes the same, whatever stood around them."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from torchfuse.cases import Case
from torchfuse.lowering.capture import capture


def settled(norm: nn.Module) -> nn.Module:
    """Give a batch norm statistics and an affine that no fold can ignore unnoticed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
        if norm.affine:
            norm.weight.uniform_(-2, 2, generator=generator)
            norm.bias.normal_(generator=generator)
    return norm


class Branched(nn.Module):
    """The conv's output is read by the batch norm and by the addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = settled(nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class SharedConv(Branched):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv(x.abs())


class Parametrized(Branched):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Functional(Branched):
    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.conv2d(x, self.conv.weight, stride=2)
        bn = self.bn
        return nn.functional.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias)


class LinearOverLength(nn.Module):
    """[N, C, L] with C equal to L: the batch norm's channels are not the linear's features."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 5)
        self.bn = settled(nn.BatchNorm1d(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(x))


CASES = {
    "conv1d": (nn.Sequential(nn.Conv1d(3, 6, 3), settled(nn.BatchNorm1d(6))), (2, 3, 9)),
    "conv2d": (nn.Sequential(nn.Conv2d(3, 6, 3), settled(nn.BatchNorm2d(6))), (2, 3, 9, 9)),
    "no bias": (
        nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), settled(nn.BatchNorm2d(6))),
        (2, 3, 9, 9),
    ),
    "no affine": (
        nn.Sequential(nn.Conv2d(3, 6, 3), settled(nn.BatchNorm2d(6, affine=False))),
        (2, 3, 9, 9),
    ),
    "same padding": (
        nn.Sequential(nn.Conv2d(3, 6, 3, padding="same"), settled(nn.BatchNorm2d(6))),
        (2, 3, 9, 9),
    ),
    "grouped": (
        nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), settled(nn.BatchNorm2d(6))),
        (2, 4, 9, 9),
    ),
    "conv3d": (nn.Sequential(nn.Conv3d(3, 6, 3), settled(nn.BatchNorm3d(6))), (2, 3, 5, 5, 5)),
    "transposed": (
        nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2), settled(nn.BatchNorm2d(6))),
        (2, 4, 5, 5),
    ),
    "grouped transposed": (
        nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), settled(nn.BatchNorm2d(6))),
        (2, 4, 5, 5),
    ),
    "linear": (nn.Sequential(nn.Linear(4, 6), settled(nn.BatchNorm1d(6))), (3, 4)),
    "dropout between": (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.Dropout(0.5), settled(nn.BatchNorm2d(6))),
        (2, 3, 9, 9),
    ),
    "functional": (Functional(), (2, 3, 9, 9)),
    "computed weight": (Parametrized(), (2, 3, 9, 9)),
}
PLAIN = {
    "conv with a second user": (Branched(), (2, 3, 9, 9), {"conv2d": 2}),
    "no conv before": (settled(nn.BatchNorm2d(3)), (2, 3, 9, 9), {"conv2d": 1}),
    "over [N, C, L]": (settled(nn.BatchNorm1d(3)), (2, 3, 9), {"conv1d": 1}),
    "over [N, C]": (settled(nn.BatchNorm1d(3)), (2, 3), {"mul": 1, "add": 1}),
    "over [N, C, D, H, W]": (settled(nn.BatchNorm3d(3)), (2, 3, 4, 4, 4), {"mul": 1, "add": 1}),
    "linear on [N, C, L]": (LinearOverLength(), (2, 5, 7), {"linear": 1, "conv1d": 1}),
}


def without_batch_norms(model: nn.Module, x: Tensor) -> tuple[nn.Module, Counter[str]]:
    program = capture(model.eval(), Case((x,)))
    calls = (node.target for node in program.graph.nodes if node.op == "call_function")
    return program.module(), Counter(str(target).split(".")[1] for target in calls)


@pytest.mark.parametrize("name", CASES)
def test_folds(name: str) -> None:
    model, shape = CASES[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    folded, calls = without_batch_norms(model, x)
    assert "batch_norm" not in calls
    assert calls.total() - calls["dropout"] == 1
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_written_as_what_it_is_where_it_cannot_be_folded(name: str) -> None:
    model, shape, expected = PLAIN[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain, calls = without_batch_norms(model, x)
    assert "batch_norm" not in calls
    assert {operator: calls[operator] for operator in expected} == expected
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_shared_conv_is_folded_for_one_call_and_kept_for_the_other() -> None:
    model, x = SharedConv().eval(), torch.randn(2, 3, 9, 9)
    folded, calls = without_batch_norms(model, x)
    assert calls == {"conv2d": 2, "abs": 1, "add": 1}
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_batch_norm_without_statistics_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False))
    x = torch.randn(4, 3, 9, 9)
    same, calls = without_batch_norms(model, x)
    assert calls["batch_norm"] == 1
    torch.testing.assert_close(same(x), model(x))


def test_the_weights_that_were_folded_do_not_stay() -> None:
    model, shape = CASES["conv2d"]
    folded, _ = without_batch_norms(model, torch.randn(shape))
    numbers = sum(value.numel() for value in folded.state_dict().values())
    assert numbers == 6 * 3 * 3 * 3 + 6


def test_the_model_itself_is_unchanged() -> None:
    model, shape = CASES["conv2d"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    without_batch_norms(model, torch.randn(shape))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
