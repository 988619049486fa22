"""A YOLO-like detector (after YOLOv5/v8): SiLU convs, split bottlenecks, SPPF, three heads."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Module):
    """Convolution, batch norm, SiLU."""

    default_activation = nn.SiLU()  # one object for all layers, as in the original

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03)
        self.act = self.default_activation

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        """Return what `forward` does once `YOLO.fuse` has put the batch norm into the conv."""
        return self.act(self.conv(x))


class Bottleneck(nn.Module):
    """Two 3×3 convs and a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.cv1 = Conv(channels, channels, 3)
        self.cv2 = Conv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Split in two, a chain of bottlenecks on one half, all parts concatenated."""

    def __init__(self, inputs: int, outputs: int, repeats: int):
        super().__init__()
        self.hidden = outputs // 2
        self.cv1 = Conv(inputs, 2 * self.hidden)
        self.cv2 = Conv((2 + repeats) * self.hidden, outputs)
        self.m = nn.ModuleList(Bottleneck(self.hidden) for _ in range(repeats))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        parts.extend(m(parts[-1]) for m in self.m)
        return self.cv2(torch.cat(parts, 1))


class SPPF(nn.Module):
    """Three poolings in a row, all four scales concatenated."""

    def __init__(self, channels: int):
        super().__init__()
        self.cv1 = Conv(channels, channels // 2)
        self.cv2 = Conv(2 * channels, channels)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y = self.m(x)
        z = self.m(y)
        return self.cv2(torch.cat((x, y, z, self.m(z)), 1))


class YOLO(nn.Module):
    """Backbone, top-down neck, one prediction per scale: returns a list of three tensors."""

    def __init__(self, width: int = 16, repeats: int = 1, classes: int = 80):
        super().__init__()
        self.stem = Conv(3, width, 3, 2)
        widths = [width << i for i in range(4)]
        self.stages = nn.ModuleList(
            nn.Sequential(Conv(narrow, wide, 3, 2), C2f(wide, wide, repeats))
            for narrow, wide in itertools.pairwise(widths)
        )
        self.sppf = SPPF(widths[3])
        self.neck2 = C2f(widths[3] + widths[2], widths[2], repeats)
        self.neck1 = C2f(widths[2] + widths[1], widths[1], repeats)
        self.heads = nn.ModuleList(
            nn.Sequential(Conv(w, w, 3), nn.Conv2d(w, classes + 4, 1)) for w in widths[1:]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        scales = [self.stem(x)]
        for stage in self.stages:
            scales.append(stage(scales[-1]))  # each scale reads the one before
        _, p3, p4, p5 = scales
        p5 = self.sppf(p5)
        p4 = self.neck2(torch.cat((F.interpolate(p5, scale_factor=2.0), p4), 1))
        p3 = self.neck1(torch.cat((F.interpolate(p4, scale_factor=2.0), p3), 1))
        return [head(p) for head, p in zip(self.heads, (p3, p4, p5), strict=True)]

    def fuse(self) -> "YOLO":
        """Fold every batch norm in place, as the original's own method does."""
        for module in self.modules():
            if isinstance(module, Conv) and hasattr(module, "bn"):
                module.conv = nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
                delattr(module, "bn")
                module.forward = module.forward_fuse
        return self
