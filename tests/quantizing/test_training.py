"""Quantization-aware training: the user's loop, then int8; batch norms are right in both modes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchfuse
from torchfuse.errors import InputError

# Torch's own, when it copies an exported graph.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return self.head(x.mean((2, 3)))


def batch(seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Pictures whose middle is light or dark, and which it is."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (size,), generator=generator)
    pictures = torch.randn(size, 1, 8, 8, generator=generator)
    pictures[:, :, 2:6, 2:6] += (labels * 2.0 - 1).reshape(-1, 1, 1, 1)
    return pictures, labels


def trained(model: nn.Module, steps: int = 40) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for seed in range(steps):
        pictures, labels = batch(seed)
        optimizer.zero_grad()
        F.cross_entropy(model(pictures), labels).backward()
        optimizer.step()
    return model


def accuracy(model: nn.Module) -> float:
    pictures, labels = batch(1000, 200)
    with torch.no_grad():
        return (model(pictures).argmax(1) == labels).double().mean().item()


@pytest.fixture(scope="module")
def given() -> nn.Module:
    return Net().eval()


@pytest.fixture(scope="module")
def prepared(given: nn.Module) -> nn.Module:
    return torchfuse.prepare_qat(given, batch(0)[0][:1])


@pytest.fixture
def training(prepared: nn.Module) -> nn.Module:
    return copy.deepcopy(prepared)


def test_training_with_int8_simulated_learns_and_converts(
    given: nn.Module, training: nn.Module
) -> None:
    before = {name: value.clone() for name, value in given.state_dict().items()}
    assert accuracy(training.eval()) < 0.8
    trained(training)
    simulated = accuracy(training.eval())
    kept = {name: value.clone() for name, value in training.state_dict().items()}
    result = torchfuse.convert_qat(training)
    assert simulated > 0.95
    assert accuracy(result.model) > simulated - 0.02
    assert [layer.int8 for layer in result.layers] == [True, True]
    assert result.report.scheme == "int8, trained"

    # What was given to either of the two is as it was.
    assert not given.training
    assert all(torch.equal(before[name], value) for name, value in given.state_dict().items())
    after = training.state_dict()
    unmoved = [
        name for name in kept if "activation_post_process" not in name
    ]  # they saw `pictures`
    assert all(torch.equal(kept[name], after[name]) for name in unmoved)

    # The batch norm is folded, with the running statistics of the training.
    assert "batch_norm" not in str(result.model.graph)
    pictures, _ = batch(7)
    with torch.no_grad():
        expected, got = training(pictures), result.model(pictures)
    assert 10 * torch.log10(expected.square().sum() / (expected - got).square().sum()) > 25


def test_in_training_mode_the_batch_norm_uses_the_batch(training: nn.Module) -> None:
    from torchao.quantization.pt2e import disable_observer

    pictures, _ = batch(3)
    with torch.no_grad():
        training.train()(pictures)
        training.apply(disable_observer)  # the ranges would move from one call to the next
        alone, among = training(pictures[:4]), training(pictures)[:4]
        assert (alone - among).abs().max() > 0.02
        training.eval()
        alone, among = training(pictures[:4]), training(pictures)[:4]
        assert (alone - among).abs().max() < 1e-5


def test_converting_what_was_not_prepared_is_an_error() -> None:
    with pytest.raises(InputError, match=r"Expected a model that torchfuse\.prepare_qat made"):
        torchfuse.convert_qat(Net())


def test_weights_in_another_precision_are_an_error() -> None:
    with pytest.raises(InputError, match=r"got torch.bfloat16 \('conv.weight'\); call model.float"):
        torchfuse.prepare_qat(Net().bfloat16(), torch.ones(2, 1, 8, 8))


def test_training_that_left_nan_in_the_weights_is_an_error() -> None:
    training = torchfuse.prepare_qat(Net(), torch.ones(2, 1, 8, 8))
    with torch.no_grad():
        next(training.parameters()).fill_(torch.nan)
    with pytest.raises(InputError, match=r"finite weights, but 'conv.weight' has NaN in 72 of its"):
        torchfuse.convert_qat(training)
