"""Batch norms of classes that are none of torch's: frozen ones, written as arithmetic."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchfuse
from support.fusing_checks import IMAGE, assert_fuses, check


class Frozen(nn.Module):
    """What detection libraries write."""

    def __init__(self, channels):
        super().__init__()
        generator = torch.Generator().manual_seed(channels)
        self.register_buffer("weight", torch.rand(channels, generator=generator) + 0.5)
        self.register_buffer("bias", torch.randn(channels, generator=generator))
        self.register_buffer("running_mean", torch.randn(channels, generator=generator))
        self.register_buffer("running_var", torch.rand(channels, generator=generator) + 0.3)

    def forward(self, x):
        weight = self.weight.reshape(1, -1, 1, 1)
        bias = self.bias.reshape(1, -1, 1, 1)
        var = self.running_var.reshape(1, -1, 1, 1)
        mean = self.running_mean.reshape(1, -1, 1, 1)
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class Functional(Frozen):
    eps = 1e-3

    def forward(self, x):
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps
        )


class Either(Functional):
    """One way where gradients are wanted, another where not."""

    def forward(self, x):
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            shift = self.bias - self.running_mean * scale
            scale, shift = scale.reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1)
            return x * scale.to(x.dtype) + shift.to(x.dtype)
        return super().forward(x)


def net(norm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, bias=False), norm(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), norm(4)
    ).eval()


@pytest.mark.parametrize("norm", [Frozen, Functional, Either])
def test_a_frozen_batch_norm_is_folded(norm):
    model = net(norm)
    result = assert_fuses(model, IMAGE, 2)
    assert [type(result.model[i]) for i in (1, 4)] == [nn.Identity, nn.Identity]
    for same in (copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))):
        assert torch.equal(same(IMAGE), result.model(IMAGE))


@pytest.mark.parametrize("norm", [Frozen, Functional])
def test_a_frozen_batch_norm_comes_back_and_takes_old_checkpoints(norm):
    model, other = net(norm), net(norm)
    for tensor in other.state_dict().values():
        tensor.mul_(1.25)
    fused = torchfuse.fuse(model, IMAGE).model
    assert torch.equal(torchfuse.unfuse(fused)(IMAGE), model(IMAGE))
    buffer = io.BytesIO()
    torch.save(other.state_dict(), buffer)
    buffer.seek(0)
    torchfuse.load_unfused_state_dict(fused, torch.load(buffer, weights_only=True))
    torch.testing.assert_close(fused(IMAGE), other(IMAGE))


class FrozenSequence(Frozen):
    """The same for sequences: one dimension less."""

    def forward(self, x):
        scale = self.weight.reshape(1, -1, 1) * (self.running_var.reshape(1, -1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias - self.running_mean * scale.flatten()).reshape(1, -1, 1)


class Strict(Frozen):
    """One that looks at its input first."""

    def forward(self, x):
        if x.dim() != 4:
            raise ValueError(f"expected 4 dimensions, got {x.dim()}")
        return super().forward(x)


@pytest.mark.parametrize(
    ("conv", "norm", "shape"),
    [(nn.Conv1d, FrozenSequence, (2, 4, 9)), (nn.Conv2d, Strict, (2, 4, 9, 9))],
)
def test_a_frozen_batch_norm_for_so_many_dimensions_is_folded(conv, norm, shape):
    torch.manual_seed(0)
    assert_fuses(nn.Sequential(conv(4, 8, 3), norm(8)).eval(), torch.randn(shape))


class Activated(Frozen):
    def forward(self, x):
        return super().forward(x).relu()


class Before(Frozen):
    def forward(self, x):
        return super().forward(x.relu())


class ByPixel(Frozen):
    """Not by channel where there is one row for each."""

    def forward(self, x):
        scale = self.weight.reshape(1, 1, -1, 1) * (self.running_var + 1e-5).rsqrt()[:, None]
        return x * scale + self.bias.reshape(1, 1, -1, 1)


class ByBatch(Frozen):
    def forward(self, x):
        scale = self.weight.reshape(1, -1, 1, 1) / x.std()
        return x * scale + self.bias.reshape(1, -1, 1, 1)


class TwiceAdded(Frozen):
    def forward(self, x):
        return super().forward(x) + x


class InPlace(Frozen):
    def forward(self, x):
        return x.mul_(self.weight.reshape(1, -1, 1, 1)).add_(self.bias.reshape(1, -1, 1, 1))


class Scored(Frozen):
    def score(self):
        return self.running_var.sum()


@pytest.mark.parametrize("norm", [Activated, Before, ByPixel, ByBatch, TwiceAdded, InPlace, Scored])
def test_what_does_more_or_otherwise_is_skipped(norm):
    torch.manual_seed(0)
    image = torch.randn(2, 4, 10, 10)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), norm(8)).eval()
    assert check(model, image).plan.fusions == ()
