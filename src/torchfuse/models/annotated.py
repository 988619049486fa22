"""The example model of PyTorch's "Fuse Modules" recipe."""

import torch
from torch import nn
from torch.ao.quantization import DeQuantStub, QuantStub

INPUT_SHAPE = (1, 3, 224, 224)


class AnnotatedConvBnReLUModel(nn.Module):
    """Conv → batch norm → ReLU between quantization stubs, channels_last inside.

    Takes `[N, 3, H, W]`, returns `[N, 5, H - 2, W - 2]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, bias=False)
        self.bn = nn.BatchNorm2d(5)
        self.relu = nn.ReLU(inplace=True)
        self.quant = QuantStub()
        self.dequant = DeQuantStub()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return relu(bn(conv(x)))."""
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.quant(x)
        x = self.conv(x)
        x = self.bn(x)
        x = self.relu(x)
        x = self.dequant(x)
        return x
