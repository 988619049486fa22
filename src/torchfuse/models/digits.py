"""A small conv net on scikit-learn's digits, trained in seconds."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.ao.quantization import DeQuantStub, QuantStub

INPUT_SHAPE = (1, 1, 8, 8)
EPOCHS = 8


@dataclass(frozen=True)
class Digits:
    """The 1797 labelled 8×8 images, values in [0, 1], split two to one and stratified."""

    train_images: torch.Tensor  # [1203, 1, 8, 8] float32
    train_labels: torch.Tensor  # [1203] int64
    test_images: torch.Tensor  # [594, 1, 8, 8] float32
    test_labels: torch.Tensor  # [594] int64


def load() -> Digits:
    """Return the digits, always split the same way; nothing is downloaded."""
    data = load_digits()
    images = (data.images / 16.0).astype(numpy.float32)[:, None]
    split = train_test_split(
        images, data.target, test_size=0.33, random_state=0, stratify=data.target
    )
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, split)
    return Digits(train_images, train_labels, test_images, test_labels)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class DigitsNet(nn.Module):
    """Three conv → batch norm → ReLU blocks and two linears: `[N, 1, 8, 8]` to `[N, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = QuantStub()
        self.block1 = _block(1, 32)
        self.block2 = _block(32, 32)
        self.pool1 = nn.MaxPool2d(2)
        self.block3 = _block(32, 64)
        self.pool2 = nn.MaxPool2d(2)
        self.hidden = nn.Linear(256, 64)
        self.relu = nn.ReLU()
        self.logits = nn.Linear(64, 10)
        self.dequant = DeQuantStub()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits, `[N, 10]`."""
        x = self.quant(x)
        x = self.pool1(self.block2(self.block1(x)))
        x = self.pool2(self.block3(x))
        x = self.relu(self.hidden(x.flatten(1)))
        x = self.dequant(self.logits(x))
        return x


# What `fuse_modules` wants to be told; `torchfuse.plan` finds the batch norms by itself.
MODULES_TO_FUSE = [
    ["block1.0", "block1.1", "block1.2"],
    ["block2.0", "block2.1", "block2.2"],
    ["block3.0", "block3.1", "block3.2"],
    ["hidden", "relu"],
]


def train(
    digits: Digits,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
    on_epoch: Callable[[int], None] | None = None,
) -> DigitsNet:
    """Return a net trained on the training part (AdamW, one-cycle), in eval mode.

    `on_epoch` is called with the number of finished epochs. The global random state is restored.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DigitsNet()
        batch = 64
        steps = epochs * -(-len(digits.train_images) // batch)
        optimizer = torch.optim.AdamW(net.parameters(), lr=9e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=9e-3, total_steps=steps)
        net.train()
        for epoch in range(epochs):
            for indices in torch.randperm(len(digits.train_images)).split(batch):
                loss = nn.functional.cross_entropy(
                    net(digits.train_images[indices]), digits.train_labels[indices]
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            if on_epoch is not None:
                on_epoch(epoch + 1)
    return net.eval()


def accuracy(predict: Callable[[torch.Tensor], torch.Tensor], digits: Digits) -> float:
    """Return the share of the held-out third that `predict` (images to logits) gets right.

    Images are given one at a time, as an artifact saved for batch 1 takes them.
    """
    with torch.inference_mode():
        right = sum(
            int(predict(image[None]).argmax() == label)
            for image, label in zip(digits.test_images, digits.test_labels, strict=True)
        )
    return right / len(digits.test_labels)
