"""What a target cannot take: the operator by name, what can, and nothing half-written."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchfuse
from torchfuse.errors import UnsupportedError


class SingularValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x)


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i1e(x)


TABLE = [
    (".pte", SingularValues(), r"svd.*'\.pt' has all operators, and '\.onnx' and '\.xml' have"),
    (".pte", Bessel(), r"special_i1e.*'\.pt' has all operators"),
    (".onnx", Bessel(), r"ONNX cannot have this model: .*bessel_i1e; '\.pt' has all"),
    (".xml", SingularValues(), r"svd.*'\.pt' has all operators, and '\.pte' and '\.onnx' have"),
    (".xml", Bessel(), r"i1e.*'\.pt' has all operators"),
]


@pytest.mark.parametrize(("suffix", "model", "message"), TABLE)
def test_an_operator_that_a_target_lacks_is_named_with_what_has_it(
    suffix: str, model: nn.Module, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        torchfuse.export(model.eval(), torch.rand(3, 3), tmp_path / f"m{suffix}")
    assert list(tmp_path.iterdir()) == []
