"""Quantization-aware training of a small digits model with a loop of one's own.

python examples/qat_digits.py [--epochs 3] [--out digits.pte]
"""

import argparse

import torch
from torch import nn

import torchfuse
from torchfuse.models.digits import accuracy, load, train


def main() -> None:
    """Train in float, train on with int8 simulated, convert, export, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", default="digits.pte")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = load()
    model = train(data)
    print(f"float: {100 * accuracy(model, data):.2f} %")

    training = torchfuse.prepare_qat(model, data.train_images[:2])
    optimizer = torch.optim.AdamW(training.parameters(), lr=1e-4)
    training.train()
    for epoch in range(options.epochs):
        for batch in torch.randperm(len(data.train_images)).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(
                training(data.train_images[batch]), data.train_labels[batch]
            )
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}")

    quantized = torchfuse.convert_qat(training).model
    print(f"int8: {100 * accuracy(quantized, data):.2f} %")
    artifact = torchfuse.export(quantized, data.test_images[:1], options.out)
    print(f"wrote {artifact.path} ({artifact.size_bytes:,} bytes)")


if __name__ == "__main__":
    main()
