"""A network written as torchvision's are: fused, proven on inputs of your own, exported.

python examples/torchvision_like.py [FOLDER]

With torchvision installed, `torchvision.models.resnet18(weights="DEFAULT")` takes Residual's place.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import torchfuse


class Block(nn.Module):
    """Two convolutions, and the input added: torchvision's BasicBlock."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return N×outputs×H/stride×W/stride."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.downsample(x)
        return self.relu(y)


class Residual(nn.Sequential):
    """Scores of ten classes, N×10, of pictures, N×3×H×W."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            Block(8, 16, 2),
            Block(16, 32, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )


def main(folder: Path) -> None:
    """Fuse, compare on other inputs, and write fused.pte."""
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.rand(1, 3, 32, 32)
    result = torchfuse.fuse(model, x)
    print(f"{len(result.plan.fusions)} fused, {len(result.plan.skips)} not fused")
    # Fuse has compared already; this is for inputs that matter to you.
    found = torchfuse.verify(model, result.model, torch.rand(4, 3, 48, 48))
    print(f"the same outputs: {found.passed}")
    artifact = torchfuse.export(result.model, x, folder / "fused.pte")
    print(f"wrote {artifact.path.name}, in {artifact.precision}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "."))
