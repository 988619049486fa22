"""RepVGG (Ding et al. 2021), before re-parameterisation: three parallel branches, one bare."""

import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    """A Sequential with the children `conv` and `bn`, as in the paper's code."""
    branch = nn.Sequential()
    branch.add_module("conv", nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False))
    branch.add_module("bn", nn.BatchNorm2d(outputs))
    return branch


class RepVGGBlock(nn.Module):
    """3×3 + 1×1 + (where shapes allow) a batch norm on its own, which follows no layer."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.rbr_dense = conv_bn(inputs, outputs, 3, stride)
        self.rbr_1x1 = conv_bn(inputs, outputs, 1, stride)
        alone = inputs == outputs and stride == 1
        self.rbr_identity = nn.BatchNorm2d(inputs) if alone else None
        self.nonlinearity = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        identity = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return self.nonlinearity(self.rbr_dense(x) + self.rbr_1x1(x) + identity)


class RepVGG(nn.Module):
    """`depth` blocks per stage over three stages."""

    def __init__(self, width: int = 64, depth: int = 2, classes: int = 1000):
        super().__init__()
        blocks: list[nn.Module] = []
        channels = 3
        for stage in range(3):
            for index in range(depth):
                blocks.append(RepVGGBlock(channels, width << stage, 2 if index == 0 else 1))
                channels = width << stage
        self.stages = nn.Sequential(*blocks)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.adaptive_avg_pool2d(self.stages(x), 1).flatten(1))
