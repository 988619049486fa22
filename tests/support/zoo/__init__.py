"""Models with batch norms, small enough for tests, each with the inputs it takes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from support.as_if_trained import as_if_trained, keep_scale
from support.zoo import families
from support.zoo.conformer import ConformerBlock
from support.zoo.crnn import CRNN
from support.zoo.densenet import DenseNet
from support.zoo.inception import Inception
from support.zoo.mobilenet_v3 import MobileNetV3
from support.zoo.repvgg import RepVGG
from support.zoo.resnet import Bottleneck, ResNet
from support.zoo.unet import UNet
from support.zoo.yolo import YOLO
from torchfuse.models.mobilenet_v2 import MobileNetV2

MOBILENET_V3_ROWS = (  # every kind of row of table 2, an eighth as wide
    (3, 16, 8, True, False, 2),
    (3, 24, 8, False, False, 1),
    (5, 24, 16, True, True, 2),
    (5, 48, 16, True, True, 1),
)


@dataclass(frozen=True)
class Entry:
    """A model of the zoo: how to build it, and the shape of one example."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]  # without the batch

    def inputs(self, batch: int = 2, seed: int = 1) -> Tensor:
        """Return random examples, `[batch, *shape]`."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, *self.shape, generator=generator)

    def model(self) -> nn.Module:
        """Return a new model with statistics that hide nothing, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            built = self.build()
            keep_scale(built)
        return as_if_trained(built, lambda model: model(self.inputs(batch=4, seed=2)))


HAND_WRITTEN = (
    Entry("ResNet, basic", lambda: ResNet(width=8, classes=10), (3, 64, 64)),
    Entry("ResNet, bottleneck", lambda: ResNet(Bottleneck, (1, 2, 1, 1), 8, 10), (3, 64, 64)),
    # At 64×64 its last maps are 2×2, and the statistics of so few values amplify rounding.
    Entry("MobileNetV2", lambda: MobileNetV2(10, 0.25), (3, 96, 96)),
    Entry("MobileNetV3", lambda: MobileNetV3(MOBILENET_V3_ROWS, 8, 10), (3, 64, 64)),
    Entry("DenseNet", lambda: DenseNet((2, 3, 2), 8, 16, 10), (3, 64, 64)),
    Entry("Inception", lambda: Inception(8, 10), (3, 32, 32)),
    Entry("RepVGG", lambda: RepVGG(8, 2, 10), (3, 32, 32)),
    Entry("U-Net", lambda: UNet(8, 3), (3, 40, 36)),
    Entry("YOLO-like", lambda: YOLO(8, 1, 3), (3, 64, 64)),
    Entry("CRNN", lambda: CRNN(8, 16), (1, 32, 48)),
    Entry("Conformer block", lambda: ConformerBlock(16, 2, 7), (20, 16)),
)

FAMILIES = (
    Entry("transformers ResNet", families.resnet, (3, 64, 64)),
    Entry("transformers RegNet", families.regnet, (3, 64, 64)),
    Entry("transformers MobileNetV1", families.mobilenet_v1, (3, 96, 96)),
    Entry("transformers MobileNetV2", families.mobilenet_v2, (3, 96, 96)),
    Entry("transformers LeViT", families.levit, (3, 64, 64)),
)
