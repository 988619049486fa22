"""The three cases of PyTorch's own conv-bn fusion tests, given example inputs.

After the `test_conv_bn_fusion*` cases of pytorch's test/fx/test_fx_experimental.py, where the model
is traced first and fused without inputs.
"""

import torch
from torch import Tensor, nn

import torchfuse
from support.zoo.resnet import ResNet


class ConvBn(nn.Module):
    """One convolution and the batch norm after it."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d):
        super().__init__()
        self.conv, self.bn = conv, bn

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_conv_bn_fusion() -> None:
    model = ResNet().eval()  # ResNet-18
    fused = torchfuse.fuse(model, torch.randn(1, 3, 64, 64)).model
    assert not has_batch_norm(fused)
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(fused(images), model(images))


def test_conv_bn_fusion_not_running_state() -> None:
    bn = nn.BatchNorm2d(64, track_running_stats=False)
    model = ConvBn(nn.Conv2d(32, 64, 3, stride=2), bn).eval()
    images = torch.randn(1, 32, 50, 50)
    fused = torchfuse.fuse(model, images).model
    assert has_batch_norm(fused)  # it normalises by the batch: nothing to fold
    torch.testing.assert_close(fused(images), model(images))


def test_conv_bn_fusion_mixed_dtype() -> None:
    conv = nn.Conv2d(3, 16, 3, padding=1, bias=False, dtype=torch.bfloat16)
    model = ConvBn(conv, nn.BatchNorm2d(16, eps=0.001)).eval()
    images = torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)
    fused = torchfuse.fuse(model, images).model
    assert not has_batch_norm(fused)
    torch.testing.assert_close(fused(images), model(images))
