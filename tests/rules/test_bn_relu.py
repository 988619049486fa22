"""Batch norm → relu into one fused class, on request, where the batch norm stays."""

import pytest
import torch
import torch.ao.nn.intrinsic as nni
from torch import nn

import torchfuse
from fusing_checks import IMAGE, trained


@pytest.mark.parametrize(("dims", "fused"), [(2, nni.BNReLU2d), (3, nni.BNReLU3d)])
def test_fuses_where_there_is_a_class(dims, fused):
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, *[5] * dims)
    norm = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](4)
    model = trained(nn.Sequential(norm, nn.ReLU()), inputs)
    result = torchfuse.fuse(model, inputs, rules=["bn_relu"])
    assert type(result.model[0]) is fused
    assert torch.equal(result.model(inputs), model(inputs))
    assert result.key_map["0.running_mean"] == "0.0.running_mean"


def test_left_alone_without_being_asked_for():
    model = trained(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), IMAGE)
    assert torchfuse.plan(model, IMAGE).fusions == ()


def test_one_dimension_has_no_fused_class():
    rows = torch.randn(4, 3)
    model = trained(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), rows)
    skips = torchfuse.plan(model, rows, rules=["bn_relu"]).skips
    reasons = [skip.reason for skip in skips if skip.rule == "bn_relu"]
    assert reasons == [
        "`0` is a BatchNorm1d; there are fused classes for BatchNorm2d, BatchNorm3d."
    ]


def test_a_batch_norm_that_is_folded_is_not_merged():
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), IMAGE)
    result = torchfuse.fuse(model, IMAGE, rules=["conv_bn", "bn_relu"])
    assert [fusion.rule for fusion in result.plan.fusions] == ["conv_bn"]
