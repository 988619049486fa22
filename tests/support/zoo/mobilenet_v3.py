"""MobileNetV3 (Howard et al. 2019): hard-swish, squeeze-and-excitation, inverted residuals."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

# kernel, expanded, outputs, squeeze-and-excitation, hard-swish, stride: table 2 of the paper
SMALL = (
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
)


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate computed from its mean."""

    def __init__(self, channels: int):
        super().__init__()
        self.reduce = nn.Conv2d(channels, max(4, channels // 4), 1)
        self.expand = nn.Conv2d(max(4, channels // 4), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.relu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * F.hardsigmoid(self.expand(gate))


class ConvNormActivation(nn.Sequential):
    """Convolution, batch norm and, unless `activation` is None, an activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: type[nn.Module] | None = None,
    ):
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01),
        ]
        if activation is not None:
            layers.append(activation(inplace=True))
        super().__init__(*layers)


class InvertedResidual(nn.Module):
    """Expand, depthwise, gate, project; a shortcut where the shapes allow it."""

    def __init__(self, inputs: int, row: Sequence[int]):
        super().__init__()
        kernel, expanded, outputs, gated, hard, stride = row
        activation = nn.Hardswish if hard else nn.ReLU
        layers: list[nn.Module] = []
        if expanded != inputs:
            layers.append(ConvNormActivation(inputs, expanded, activation=activation))
        layers.append(ConvNormActivation(expanded, expanded, kernel, stride, expanded, activation))
        if gated:
            layers.append(SqueezeExcitation(expanded))
        layers.append(ConvNormActivation(expanded, outputs))
        self.block = nn.Sequential(*layers)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.shortcut else self.block(x)


class MobileNetV3(nn.Module):
    """The small variant by default; `rows` as in table 2 of the paper."""

    def __init__(self, rows: Sequence[Sequence[int]] = SMALL, stem: int = 16, classes: int = 1000):
        super().__init__()
        layers: list[nn.Module] = [ConvNormActivation(3, stem, 3, 2, activation=nn.Hardswish)]
        channels = stem
        for row in rows:
            layers.append(InvertedResidual(channels, row))
            channels = row[2]
        last = rows[-1][1]
        layers.append(ConvNormActivation(channels, last, activation=nn.Hardswish))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(last, 2 * last),
            nn.Hardswish(inplace=True),
            nn.Dropout(0.2, inplace=True),
            nn.Linear(2 * last, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))
