"""What ExecuTorch has been reported to compute wrongly, and our files of it do not.

Each links the report. `export` compares every file with its model, so that a defect would be an
error and no file; these say that there is a file.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchfuse
from support.as_if_trained import as_if_trained
from support.zoo.yolo import SPPF, C2f, Conv


class Transposed(nn.Module):
    """A parameter that is used transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.weight.t().sum(0)


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    "kernel", [2, 4, (2, 3)]
)  # https://github.com/pytorch/executorch/issues/20558
def test_same_padding_of_an_even_kernel(kernel: Any, precision: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Conv2d(3, 4, kernel, padding="same").eval(), image(1, 3, 9, 8)
    data = [x] if precision == "int8" else None
    path = tmp_path / "m.pte"
    torchfuse.export(model, x, path, precision=precision, calibration=data)
    bound = 25.0 if data else None
    assert torchfuse.verify(model, torchfuse.load(path), x, min_sqnr_db=bound).passed


def test_one_channel_in_channels_last(tmp_path: Path) -> None:
    # https://github.com/pytorch/executorch/issues/19153
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3)).eval()
    model = model.to(memory_format=torch.channels_last)
    x = image(1, 1, 9, 8).to(memory_format=torch.channels_last)
    path = torchfuse.export(model, x, tmp_path / "m.pte").path
    torch.testing.assert_close(torchfuse.load(path)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torchfuse.DelegationWarning")
def test_a_parameter_that_is_transposed(tmp_path: Path) -> None:
    # https://github.com/pytorch/executorch/issues/19836
    torch.manual_seed(0)
    model, x = Transposed().eval(), image(3, 6)
    path = torchfuse.export(model, x, tmp_path / "m.pte").path
    torch.testing.assert_close(torchfuse.load(path)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "stride",
    [lambda x: x.transpose(2, 3), lambda x: x.flip(3)[..., ::2], lambda x: x[:, :, ::2, ::2]],
)
def test_inputs_that_are_not_contiguous(stride: Any, tmp_path: Path) -> None:
    # https://github.com/pytorch/executorch/issues/18562
    torch.manual_seed(0)
    model, x = nn.Conv2d(3, 4, 3).eval(), stride(image(1, 3, 16, 16))
    run = torchfuse.load(torchfuse.export(model, x.contiguous(), tmp_path / "m.pte").path)
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)


class Yolo(nn.Module):
    """What a YOLOv5 is made of: SiLU, split blocks, pooled pyramids, upsampling, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = Conv(3, 8, 3, 2), Conv(8, 8, 3, 2)
        self.block, self.pyramid = C2f(8, 8, 1), SPPF(8)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        small = self.pyramid(self.block(self.down(x)))
        wide = torch.cat([nn.functional.interpolate(small, scale_factor=2.0), x], 1)
        return self.head(wide), small


def test_a_yolov5_in_int8(tmp_path: Path) -> None:
    # https://github.com/pytorch/executorch/issues/1330
    torch.manual_seed(0)
    data = [torch.randn(1, 3, 32, 32) for _ in range(4)]
    model = as_if_trained(Yolo(), lambda model: model(torch.cat(data)))
    artifact = torchfuse.export(
        model, data[0], tmp_path / "m.pte", precision="int8", calibration=data
    )
    assert artifact.delegation is not None
    assert (artifact.delegation.calls_left, artifact.delegation.partitions) == (0, 1)
    run = torchfuse.load(artifact.path)
    assert torchfuse.verify(model, run, data, min_sqnr_db=20).passed
