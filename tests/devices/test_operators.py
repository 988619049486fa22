"""The operators that a file needs kernels for."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torchfuse.cases import Case
from torchfuse.devices.operators import operators_of
from torchfuse.measuring.tasks import task_of


@pytest.mark.parametrize(
    ("name", "needed"),
    [("third.pte", []), ("third.pt", ["aten::mul.Scalar"]), ("third.ptl", ["aten::mul.Scalar"])],
)
def test_they_are_read_from_the_file(
    model_files: Callable[[str], str], tmp_path: Path, name: str, needed: list[str]
) -> None:
    task = task_of(model_files(name), Case((torch.ones(1, 3, 4, 4),)), tmp_path)
    assert operators_of(task) == needed  # all of the .pte is XNNPACK's
    noted = dataclasses.replace(task, metadata={"operators": ["a::b"]})
    assert operators_of(noted) == ["a::b"]
