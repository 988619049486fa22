"""Computed weights are baked in before folding, and come back when it is undone."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import torchfuse
from support.fusing_checks import IMAGE, ConvBn, assert_fuses, trained

pytestmark = pytest.mark.filterwarnings(
    r"ignore:`torch\.nn\.utils\.weight_norm` is deprecated:FutureWarning"
)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def doubled(layer):
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


WRAPS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "one's own": doubled,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}


def wrapped(name, seed=0):
    torch.manual_seed(seed)
    return trained(ConvBn(WRAPS[name](nn.Conv2d(4, 4, 3))), IMAGE)


@pytest.mark.parametrize("name", WRAPS)
def test_a_computed_weight_is_baked_in(name):
    result = assert_fuses(wrapped(name), IMAGE)
    assert type(result.model.conv) is nn.Conv2d
    assert set(result.model.state_dict()) == {"conv.weight", "conv.bias"}
    assert isinstance(result.model.conv.weight, nn.Parameter)


@pytest.mark.parametrize("name", WRAPS)
def test_unfuse_gives_the_parametrization_back(name):
    model = wrapped(name)
    restored = torchfuse.unfuse(torchfuse.fuse(model, IMAGE).model)
    state = restored.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(restored(IMAGE), model(IMAGE))


@pytest.mark.parametrize("name", WRAPS)
def test_an_unfused_checkpoint_of_a_parametrized_model_loads(name):
    fused = torchfuse.fuse(wrapped(name), IMAGE).model
    other = wrapped(name, seed=1)
    torchfuse.load_unfused_state_dict(fused, other.state_dict())
    torch.testing.assert_close(fused(IMAGE), other(IMAGE), rtol=1e-4, atol=1e-5)


def test_a_weight_that_still_changes_is_skipped():
    model = wrapped("spectral_norm")
    model.conv.train()
    (skip,) = torchfuse.plan(model, IMAGE).skips
    assert "may change, in training mode" in skip.reason
