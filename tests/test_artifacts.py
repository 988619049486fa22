"""Model files are written whole or not at all, and a damaged one is an error, never an abort."""

import contextlib
import errno
import io
import os
import resource
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.jit.mobile import _load_for_lite_interpreter

from torchfuse.artifacts import artifact_format, check, seal_pte, seal_zip, write_atomically
from torchfuse.errors import ArtifactError

METADATA = {"precision": "fp32"}


class ConvNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return ConvNet().eval()


@pytest.fixture(scope="module")
def example() -> torch.Tensor:
    return torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)


@pytest.fixture(scope="module")
def payloads(model: torch.nn.Module, example: torch.Tensor) -> dict[str, bytes]:
    """Unsealed files, as stock PyTorch writes them."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    scripted = torch.jit.script(model)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    with warnings_of_the_lite_interpreter():
        lite = scripted._save_to_buffer_for_lite_interpreter()
    exported = torch.export.export(model, (example,))
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    return {"pt": buffer.getvalue(), "ptl": lite, "pte": bytes(program.to_executorch().buffer)}
