"""A batch norm that is a child of its convolution, which calls it itself."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchfuse
from support.fusing_checks import IMAGE, assert_fuses, check, trained


class Conv2d(nn.Conv2d):
    """As detection libraries write it."""

    def __init__(self, *args, norm=None, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x):
        x = F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


def net(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        Conv2d(4, 8, 3, bias=False, norm=nn.BatchNorm2d(8), activation=F.relu),
        Conv2d(8, 4, 1, norm=nn.BatchNorm2d(4), **options),
        Conv2d(4, 2, 1),
    )
    return trained(model, IMAGE)


def test_it_is_folded_and_the_model_stays_what_it_is():
    model = net(activation=nn.ReLU())
    result = assert_fuses(model, IMAGE, 2)
    fused = result.model
    assert type(fused[0]) is Conv2d
    assert type(fused[0].norm) is nn.Identity
    for same in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(same(IMAGE), fused(IMAGE))
    assert result.key_map["0.norm.running_mean"] == "0.bias"
    assert result.key_map["0.norm.weight"] == "0.weight"
    assert result.key_map["0.norm.num_batches_tracked"] is None
    assert result.key_map["1.weight"] == "1.weight"


def test_it_comes_back_and_takes_old_checkpoints():
    model, other = net(), net()
    for name, tensor in other.state_dict().items():
        if "num" not in name:
            tensor.mul_(1.25)
    fused = torchfuse.fuse(model, IMAGE).model
    torchfuse.load_unfused_state_dict(fused, other.state_dict())
    torch.testing.assert_close(fused(IMAGE), other(IMAGE))
    assert torch.equal(torchfuse.unfuse(fused)(IMAGE), other(IMAGE))
    again = torchfuse.fuse(model, IMAGE, keep_originals=False).model
    torch.testing.assert_close(again(IMAGE), model(IMAGE))


class Raw(Conv2d):
    def raw(self, x):
        return super().forward(x) if self.norm is None else F.conv2d(x, self.weight, self.bias)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = Raw(4, 4, 1, norm=nn.BatchNorm2d(4))

    def forward(self, x):
        return self.conv(x)

    def features(self, x):
        return self.conv.raw(x)


class NormFirst(Conv2d):
    def forward(self, x):
        return F.conv2d(self.norm(x), self.weight, self.bias)


class Residual(Conv2d):
    def forward(self, x):
        y = F.conv2d(x, self.weight, self.bias)
        return self.norm(y) + y


@pytest.mark.parametrize(
    "model",
    [
        Outer,
        lambda: NormFirst(4, 4, 1, norm=nn.BatchNorm2d(4)),
        lambda: Residual(4, 4, 1, norm=nn.BatchNorm2d(4)),
        lambda: Conv2d(4, 4, 1, norm=nn.BatchNorm2d(4), activation=nn.PReLU()),
    ],
)
def test_what_uses_the_two_otherwise_is_skipped(model):
    torch.manual_seed(0)
    model = trained(model(), IMAGE)
    methods = ("features",) if isinstance(model, Outer) else ()
    assert check(model, IMAGE, methods=methods).plan.fusions == ()
