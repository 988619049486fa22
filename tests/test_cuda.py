"""On a GPU: TF32 and cuDNN's choice of algorithm are hazards for a proof."""

import pytest
import torch
from torch import nn

import torchfuse
from support.fusing_checks import trained

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture(params=[False, True], ids=["float32", "TF32"])
def tf32(request):
    """Run the test with exact and with shortened products."""
    before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(params=[False, True], ids=["fixed algorithm", "fastest algorithm"])
def algorithm(request):
    """Run the test with cuDNN's usual choice, and with the one that it measures to be fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = request.param
    yield request.param
    torch.backends.cudnn.benchmark = before


def deep(layers):
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        for _ in range(layers)
    ]
    image = torch.randn(2, 16, 24, 24)
    return trained(nn.Sequential(*blocks), image).cuda(), image.cuda()


@pytest.mark.parametrize("layers", [1, 12])
def test_every_batch_norm_is_folded_and_proved(layers, tf32, algorithm):
    model, image = deep(layers)
    result = torchfuse.fuse(model, image)
    assert len(result.plan.fusions) == layers, str(result.plan)
    assert result.check.passed
    assert all(tensor.is_cuda for tensor in result.model.state_dict().values())
    before, after = (m.double()(image.double()) for m in (model, result.model))
    assert (before - after).abs().max() < 1e-5 * before.abs().max()  # float32 weights, rounded once


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_folded_and_proved(dtype):
    model, image = deep(3)
    result = torchfuse.fuse(model.to(dtype), image.to(dtype))
    assert len(result.plan.fusions) == 3, str(result.plan)
    assert result.check.passed


def test_a_wrong_fold_is_seen_through_the_rounding_of_tf32(tf32, monkeypatch):
    from torchfuse.fusing import module_proving
    from torchfuse.fusing.module_edits import folded_layer

    monkeypatch.setattr(
        module_proving,
        "folded_layer",
        lambda layer, w, b, child: folded_layer(layer, w * 1.001, b, child),
    )
    model, image = deep(1)
    assert torchfuse.fuse(model, image).plan.fusions == ()


def test_unfuse_and_old_checkpoints_on_the_gpu():
    model, image = deep(2)
    fused = torchfuse.fuse(model, image).model
    torchfuse.load_unfused_state_dict(fused, model.state_dict())
    assert torch.equal(torchfuse.unfuse(fused)(image), model(image))
