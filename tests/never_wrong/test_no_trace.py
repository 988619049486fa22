"""Planning leaves no trace on the model."""

import random
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchfuse
from support.fusing_checks import IMAGE, ConvBn, like, trained
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


def test_planning_leaves_generators_arrays_and_containers_in_attributes_as_they_were() -> None:
    class Model(ConvBn):
        def __init__(self) -> None:
            super().__init__()
            self.torch_generator = torch.Generator().manual_seed(0)
            self.python_generator = random.Random(0)
            self.numpy_generator = np.random.default_rng(0)
            self.numpy_state = np.random.RandomState(0)
            self.counts = np.zeros(3)
            self.nested = {"history": [deque([1]), {2}]}

        def forward(self, x: Tensor) -> Tensor:
            torch.rand(1, generator=self.torch_generator)
            self.python_generator.random()
            self.numpy_generator.random()
            self.numpy_state.rand()
            self.counts += 1
            self.nested["history"][0].append(2)
            self.nested["history"][1].add(3)
            return self.bn(self.conv(x))

        def draw(self) -> tuple[float, float, float, float]:
            return (
                torch.rand(1, generator=self.torch_generator).item(),
                self.python_generator.random(),
                self.numpy_generator.random(),
                self.numpy_state.rand(),
            )

    model, untouched = Model().eval(), Model().eval()
    torchfuse.plan(model, IMAGE)
    assert model.draw() == untouched.draw()
    assert model.counts.tolist() == [0, 0, 0]
    assert model.nested == {"history": [deque([1]), {2}]}


def test_threads_that_fuse_one_model_do_not_see_each_others_work() -> None:
    model = nn.Sequential(*(trained(ConvBn(), IMAGE) for _ in range(8)))
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: torchfuse.fuse(model, IMAGE), range(4)))
    for result in results:
        assert len(result.plan.fusions) == 8
        torch.testing.assert_close(result.model(IMAGE), model(IMAGE))
