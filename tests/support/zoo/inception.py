"""Inception blocks (Szegedy et al. 2014, 2015): parallel branches with factorised kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicConv2d(nn.Module):
    """Convolution, batch norm with ε = 0.001, and a functional in-place ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], **options: object):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, bias=False, **options)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class InceptionA(nn.Module):
    """1×1, 5×5, double 3×3 and pooling branches, concatenated."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.branch1x1 = BasicConv2d(inputs, width, 1)
        self.branch5x5_1 = BasicConv2d(inputs, width, 1)
        self.branch5x5_2 = BasicConv2d(width, width, 5, padding=2)
        self.branch3x3_1 = BasicConv2d(inputs, width, 1)
        self.branch3x3_2 = BasicConv2d(width, width, 3, padding=1)
        self.branch3x3_3 = BasicConv2d(width, width, 3, padding=1)
        self.branch_pool = BasicConv2d(inputs, width, 1)

    def _forward(self, x: Tensor) -> list[Tensor]:
        branch3x3 = self.branch3x3_3(self.branch3x3_2(self.branch3x3_1(x)))
        pooled = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        return [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            branch3x3,
            self.branch_pool(pooled),
        ]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self._forward(x), 1)


class InceptionE(nn.Module):
    """A 3×3 factorised into parallel 1×3 and 3×1 convolutions of one input."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.branch1x1 = BasicConv2d(inputs, width, 1)
        self.branch3x3_1 = BasicConv2d(inputs, width, 1)
        self.branch3x3_2a = BasicConv2d(width, width, (1, 3), padding=(0, 1))
        self.branch3x3_2b = BasicConv2d(width, width, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3_1(x)
        branches = [self.branch1x1(x), self.branch3x3_2a(branch3x3), self.branch3x3_2b(branch3x3)]
        return torch.cat(branches, 1)


class Inception(nn.Module):
    """A stem, one block of each kind, and a classifier."""

    def __init__(self, width: int = 64, classes: int = 1000):
        super().__init__()
        self.stem = BasicConv2d(3, width, 3, stride=2)
        self.mixed_a = InceptionA(width, width)
        self.mixed_e = InceptionE(4 * width, width)
        self.fc = nn.Linear(3 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed_e(self.mixed_a(self.stem(x)))
        return self.fc(F.dropout(x.mean((2, 3)), training=self.training))
