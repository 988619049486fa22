"""A model, its accuracy, and data to calibrate on, as `torchfuse compare` takes them.

python examples/digits.py DATA saves the data; docs/measuring.md shows what compare makes of it.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from torchfuse.models import digits

DATA = digits.load()
SAMPLES = 200


def net() -> tuple[nn.Module, torch.Tensor]:
    """Return a net trained in seconds, and an input of it."""
    return digits.train(DATA), DATA.test_images[:1]


def accuracy(run: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Return the share of the held-out images that `run` gets right, 0 to 1.

    It is called with every form of the model: with modules, and with functions that run a file.
    """
    return digits.accuracy(run, DATA)


def main(path: Path) -> None:
    """Save images of the training part, which accuracy is not measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, DATA.train_images[:SAMPLES].numpy())
    print(f"wrote {SAMPLES} images to {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
