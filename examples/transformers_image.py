"""A model of transformers: planned, fused, and exported to a file that needs no transformers.

python examples/transformers_image.py [FOLDER]

The weights are random, so that nothing is downloaded; yours come from `from_pretrained`.
"""

import sys
from pathlib import Path

import torch
from transformers import ResNetConfig, ResNetForImageClassification

import torchfuse


def main(folder: Path) -> None:
    """Print what is fused, and write model.onnx."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = ResNetForImageClassification(config).eval()
    inputs = {"pixel_values": torch.rand(1, 3, 32, 32)}  # by keyword, as transformers is called
    result = torchfuse.fuse(model, inputs)
    print(f"{type(result.model).__name__}: {len(result.plan.fusions)} pairs fused")
    print(f"the same outputs: {result.check.passed}")
    artifact = torchfuse.export(result.model, inputs, folder / "model.onnx")
    # transformers returns a class of its own; a file returns a plain dict.
    outputs = torchfuse.load(artifact.path)(**inputs)
    print({name: tuple(value.shape) for name, value in outputs.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "."))
