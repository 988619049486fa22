"""conv → relu into one fused class, on request."""

import pytest
import torch
import torch.ao.nn.intrinsic as nni
import torch.nn.functional as F
from torch import nn

import torchfuse
from fusing_checks import IMAGE, relative_difference, trained


def conv_relu(*between):
    torch.manual_seed(0)
    return trained(nn.Sequential(nn.Conv2d(4, 4, 3), *between, nn.ReLU()), IMAGE)


@pytest.mark.parametrize(
    ("dims", "fused"), [(1, nni.ConvReLU1d), (2, nni.ConvReLU2d), (3, nni.ConvReLU3d)]
)
def test_fuses_in_every_dimension(dims, fused):
    torch.manual_seed(0)
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](4, 4, 3)
    inputs = torch.randn(2, 4, *[6] * dims)
    model = nn.Sequential(conv, nn.ReLU()).eval()
    result = torchfuse.fuse(model, inputs, rules=["conv_relu"])
    assert type(result.model[0]) is fused
    assert type(result.model[1]) is nn.Identity
    assert torch.equal(result.model(inputs), model(inputs))


def test_is_never_done_without_being_asked_for():
    assert torchfuse.plan(conv_relu(), IMAGE).fusions == ()


def test_a_batch_norm_between_is_folded_first():
    model = conv_relu(nn.BatchNorm2d(4))
    result = torchfuse.fuse(model, IMAGE, rules=["conv_bn", "conv_relu"])
    assert [fusion.rule for fusion in result.plan.fusions] == ["conv_bn", "conv_relu"]
    assert [type(module) for module in result.model] == [nni.ConvReLU2d, nn.Identity, nn.Identity]
    assert relative_difference(model(IMAGE), result.model(IMAGE)) < 1e-5
    assert result.key_map["0.weight"] == "0.0.weight"
    assert result.key_map["1.bias"] == "0.0.bias"
    assert {key for key in result.key_map.values() if key} == set(result.model.state_dict())


def test_it_can_be_undone_and_loaded_into():
    model = conv_relu(nn.BatchNorm2d(4))
    fused = torchfuse.fuse(model, IMAGE, rules=["conv_bn", "conv_relu"]).model
    other = {key: value + 1 for key, value in model.state_dict().items()}
    restored = torchfuse.unfuse(fused)
    assert [type(module) for module in restored] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert all(torch.equal(v, restored.state_dict()[k]) for k, v in model.state_dict().items())
    torchfuse.load_unfused_state_dict(fused, other)
    model.load_state_dict(other)
    assert type(fused[0]) is nni.ConvReLU2d
    assert relative_difference(model(IMAGE), fused(IMAGE)) < 1e-5


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return F.relu(self.conv(x))


class SecondReader(Functional):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x):
        y = self.conv(x)
        return self.relu(y) + y


class Reused(SecondReader):
    def forward(self, x):
        return self.relu(self.relu(self.conv(x)) - 1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Functional, "is no nn.ReLU module"),
        (SecondReader, "also read by another use: add"),
        (Reused, "called more than once"),
    ],
)
def test_left_alone_and_says_why(model, reason):
    (skip,) = torchfuse.plan(model().eval(), IMAGE, rules=["conv_relu"]).skips
    assert reason in skip.reason
    assert skip.rule == "conv_relu"
