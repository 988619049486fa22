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


def test_a_relu_in_place_is_no_second_reader():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)
    ).eval()
    result = torchfuse.fuse(model, IMAGE, rules=["conv_relu"])
    assert len(result.plan.fusions) == 2
    assert torch.equal(result.model(IMAGE), model(IMAGE))


def test_what_was_read_before_a_relu_in_place_is_a_second_reader():
    class Model(SecondReader):
        def forward(self, x):
            y = self.conv(x)
            mean = y.mean()
            return torch.relu_(y) * 0 + self.relu(y) + mean

    class InPlace(SecondReader):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.conv(x)
            mean = y.mean()
            return self.relu(y) + mean

    for class_ in (Model, InPlace):
        model = class_().eval()
        result = torchfuse.fuse(model, IMAGE, rules=["conv_relu"], verify=False)
        assert result.plan.fusions == ()
        assert torch.equal(result.model(IMAGE), model(IMAGE))


def test_a_parametrized_conv_is_merged_as_it_is():
    torch.manual_seed(0)
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    model = nn.Sequential(conv, nn.ReLU()).eval()
    result = torchfuse.fuse(model, IMAGE, rules=["conv_relu"])
    assert type(result.model[0]) is nni.ConvReLU2d
    assert torch.equal(result.model(IMAGE), model(IMAGE))


def test_without_the_rule_that_folds_the_batch_norm_between_it_says_so():
    plan = torchfuse.plan(conv_relu(nn.BatchNorm2d(4)), IMAGE, rules=["conv_relu"])
    (skip,) = plan.skips
    assert skip.modules == ("2",)
    assert skip.reason == "Its input comes from the batch norm `1`, which this plan does not fold."


def test_a_rule_that_was_not_asked_for_is_named():
    plan = torchfuse.plan(conv_relu(nn.BatchNorm2d(4)), IMAGE, rules=["linear_bn"])
    (skip,) = plan.skips
    assert skip.reason == "The rule conv_bn, which is about it, was not asked for."


def test_a_hook_on_the_conv_is_not_passed_over_in_silence():
    model = conv_relu()
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    plan = torchfuse.plan(model, IMAGE, rules=["conv_relu"])
    assert plan.fusions == ()
    (skip,) = plan.skips
    assert "hook of `0`" in skip.reason
