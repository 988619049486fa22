"""linear → relu into one fused class, on request."""

import torch
import torch.ao.nn.intrinsic as nni
from torch import nn

import torchfuse
from fusing_checks import ROW


def test_fuses_and_computes_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU()).eval()
    result = torchfuse.fuse(model, ROW, rules=["linear_relu"])
    assert type(result.model[0]) is nni.LinearReLU
    assert torch.equal(result.model(ROW), model(ROW))


def test_left_alone_without_being_asked_for():
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU()).eval()
    assert torchfuse.plan(model, ROW).fusions == ()


def test_a_subclass_is_left_alone_and_says_why():
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(Mine(5, 3), nn.ReLU()).eval()
    (skip,) = torchfuse.plan(model, ROW, rules=["linear_relu"]).skips
    assert "is a Mine; there are fused classes for Linear" in skip.reason
