"""Planning leaves no trace on the model."""

import pytest
import torch
from torch import Tensor, nn

import torchfuse
from fusing_checks import IMAGE, ConvBn, like, trained
from torchfuse.errors import CaptureError


def test_planning_leaves_no_trace() -> None:
    class Model(ConvBn):
        def __init__(self) -> None:
            super().__init__()
            self.alone = nn.BatchNorm2d(4)
            self.drop = nn.Dropout()
            self.calls = 0
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.steps += 1
            self.last_shape = x.shape
            return self.alone(self.drop(self.bn(self.conv(x))) + x)

    model = trained(Model(), IMAGE)
    del model.last_shape
    model.alone.train()
    model.drop.train()
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = dict(model.__dict__)
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    torchfuse.plan(model, IMAGE)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert model.__dict__.keys() == attributes.keys()
    assert model.calls == attributes["calls"]
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(model.conv.weight.grad, torch.ones_like(model.conv.weight))
    assert model.alone.weight.grad is None
    assert torch.is_grad_enabled()


def test_planning_leaves_no_trace_when_the_model_raises() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError(f"no sensor for {self.bn(self.conv(x)).shape}")

    model = ConvBn.eval(Model())
    model.bn.train()
    before = model.bn.running_mean.clone()
    random_state = torch.get_rng_state()
    with pytest.raises(CaptureError, match="no sensor"):
        torchfuse.plan(model, IMAGE)
    assert torch.equal(model.bn.running_mean, before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not model.conv._forward_hooks
    assert like(IMAGE, 1).requires_grad is False
