"""DenseNet (Huang et al. 2016): norm before conv, every layer reads all that came before it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """norm, relu, 1×1, norm, relu, 3×3: `norm2` alone follows a convolution directly."""

    def __init__(self, inputs: int, growth: int, bottleneck: int = 4):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, bottleneck * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck * growth)
        self.conv2 = nn.Conv2d(bottleneck * growth, growth, 3, 1, 1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(x)))


class DenseBlock(nn.ModuleDict):
    """Layers whose inputs are all earlier outputs, concatenated."""

    def __init__(self, layers: int, inputs: int, growth: int):
        super().__init__(
            {f"layer{i}": DenseLayer(inputs + i * growth, growth) for i in range(layers)}
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))  # a layer reads what came before it
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """`depths` layers per block, halved in size and width by a transition after each block."""

    def __init__(
        self,
        depths: Sequence[int] = (6, 12, 24, 16),
        growth: int = 32,
        stem: int = 64,
        classes: int = 1000,
    ):
        super().__init__()
        self.conv0 = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        self.norm0 = nn.BatchNorm2d(stem)
        self.blocks = nn.Sequential()
        channels = stem
        for index, depth in enumerate(depths):
            self.blocks.append(DenseBlock(depth, channels, growth))
            channels += depth * growth
            if index + 1 < len(depths):
                self.blocks.append(
                    nn.Sequential(
                        nn.BatchNorm2d(channels),
                        nn.ReLU(inplace=True),
                        nn.Conv2d(channels, channels // 2, 1, bias=False),
                        nn.AvgPool2d(2, 2),
                    )
                )
                channels //= 2
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm0(self.conv0(x)), inplace=True), 3, 2, 1)
        x = F.relu(self.norm(self.blocks(x)), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))
