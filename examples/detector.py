"""A detector: branches merged, int8 from pictures of its own, boxes decoded outside the file.

python examples/detector.py [FOLDER]
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import torchfuse


class Branches(nn.Module):
    """A 3×3 and a 1×1 convolution of one input, added: RepVGG's block in training form."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.narrow = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return N×outputs×H/2×W/2."""
        return torch.relu(self.wide(x) + self.narrow(x))


class Detector(nn.Module):
    """Boxes and scores at two scales, of pictures, N×3×H×W."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Branches(3, 8)
        self.fine, self.coarse = Branches(8, 16), Branches(16, 16)
        self.heads = nn.ModuleList([nn.Conv2d(16, 5, 1), nn.Conv2d(16, 5, 1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return N×5×H/4×W/4 and N×5×H/8×W/8: left, top, right, bottom, score."""
        fine = self.fine(self.stem(x))
        features = (fine, self.coarse(fine))
        return [head(feature) for head, feature in zip(self.heads, features, strict=True)]


def decoded(outputs: list[Tensor], least: float) -> Tensor:
    """Return M×5, corners in pixels and score, of all places whose score is above `least`."""
    found = []
    for output, stride in zip(outputs, (4, 8), strict=True):
        rows, columns = output.shape[2:]
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        center = torch.stack([x, y, x, y]) * stride
        sides = output[0, :4].exp() * torch.tensor([-1.0, -1, 1, 1]).view(4, 1, 1) * stride
        boxes = torch.cat([center + sides, output[0, 4:].sigmoid()]).flatten(1).T
        found.append(boxes[boxes[:, 4] > least])
    return torch.cat(found)


def main(folder: Path) -> None:
    """Print what is merged, write detector.pte in int8, and decode what it finds."""
    torch.manual_seed(0)
    model, x = Detector().eval(), torch.rand(1, 3, 64, 64)
    merged = torchfuse.fuse(model, x, graph=True)  # each block becomes one convolution
    layers = [node for node in merged.model.graph.nodes if "conv2d" in str(node.target)]
    before = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    print(f"{before} convolutions before, {len(layers)} after")

    pictures = torch.rand(16, 3, 64, 64)  # yours: a folder, or a DataLoader
    artifact = torchfuse.export(
        model, x, folder / "detector.pte", precision="int8", calibration=pictures
    )
    print(f"XNNPACK runs {artifact.delegation.macs_share:.0%} of the multiply-accumulates")
    boxes = decoded(torchfuse.load(artifact.path)(x), least=0.0)
    print(f"{len(boxes)} boxes of {boxes.shape[1]} numbers")


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "."))
