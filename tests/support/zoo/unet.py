"""U-Net (Ronneberger et al. 2015) with batch norms, also after its transposed convolutions."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DoubleConv(nn.Sequential):
    """Twice 3×3 convolution (with bias), batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class Up(nn.Module):
    """Transposed convolution and batch norm, padded to the skip connection, concatenated."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, outputs, 2, 2)
        self.norm = nn.BatchNorm2d(outputs)
        self.conv = DoubleConv(2 * outputs, outputs)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.relu(self.norm(self.up(x)))
        missing_h, missing_w = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
        x = F.pad(x, (0, missing_w, 0, missing_h))
        return self.conv(torch.cat([skip, x], dim=1))


class UNet(nn.Module):
    """`depth` halvings; takes any image size of at least 2 ** depth."""

    def __init__(self, width: int = 64, depth: int = 3, classes: int = 2):
        super().__init__()
        self.inc = DoubleConv(3, width)
        widths = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), DoubleConv(narrow, wide))
            for narrow, wide in itertools.pairwise(widths)
        )
        self.up = nn.ModuleList(Up(wide, narrow) for narrow, wide in itertools.pairwise(widths))
        self.out = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.inc(x)]
        for down in self.down:
            levels.append(down(levels[-1]))  # each level reads the one before
        x = levels.pop()
        for up in reversed(self.up):
            x = up(x, levels.pop())
        return self.out(x)
