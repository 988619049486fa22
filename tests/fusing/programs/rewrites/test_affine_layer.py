"""A scale and a shift per channel are taken into the layer after them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.rewriting_checks import Model, calls, fused, reasons

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

X = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))


class Normalize(nn.Module):
    """Pixels to what the network was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3])[:, None, None])
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.25])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {
        "conv": nn.Conv2d(3, 8, 3, 2),
        "padded": nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        "grouped": nn.Conv2d(3, 6, 3, groups=3),
        "up": nn.ConvTranspose2d(3, 4, 2, 2),
        "norm": Normalize(),
        "bn": nn.BatchNorm2d(3),
        "head": nn.Linear(3, 5),
        "wide": nn.Linear(3 * 8 * 6, 5),
        "row": nn.Linear(6, 5),
        "pool": nn.AdaptiveAvgPool2d(1),
        "avg": nn.AvgPool2d(2),
    }


TAKES_IN: dict[str, tuple[dict[str, int], Callable[[Model, Tensor], object]]] = {
    "mean and std": ({"conv2d": 1}, lambda m, x: m.conv(m.norm(x))),
    "pixels to numbers": ({"conv2d": 1}, lambda m, x: m.conv(m.norm(x / 255))),
    "a batch norm": ({"conv2d": 1}, lambda m, x: m.conv(m.bn(x))),
    "a batch norm before groups": ({"conv2d": 1}, lambda m, x: m.grouped(m.bn(x))),
    "a scale before padding": ({"conv2d": 1}, lambda m, x: m.padded(x / 255)),
    "a scale before a transposed one": ({"conv_transpose2d": 1}, lambda m, x: m.up(x * 3)),
    "the scales of mean and std, before padding": (
        {"add": 1, "conv2d": 1},
        lambda m, x: m.padded(m.norm(x)),
    ),
    "through global pooling": (
        {"adaptive_avg_pool2d": 1, "flatten": 1, "linear": 1},
        lambda m, x: m.head(m.pool(m.bn(x)).flatten(1)),
    ),
    "through a mean": ({"mean": 1, "linear": 1}, lambda m, x: m.head(m.bn(x).mean((2, 3)))),
    "through flattening": ({"flatten": 1, "linear": 1}, lambda m, x: m.wide(m.bn(x).flatten(1))),
    "a shift alone, through flattening": (
        {"flatten": 1, "linear": 1},
        lambda m, x: m.wide((x + m.norm.mean).flatten(1)),
    ),
    "a scale alone, through flattening": (
        {"flatten": 1, "linear": 1},
        lambda m, x: m.wide((x * m.norm.std).flatten(1)),
    ),
    "mean and std written in the forward": (
        {"conv2d": 1},
        lambda m, x: m.conv((x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor(0.2)),
    ),
    "mean and std in place, of a copy": (
        {"conv2d": 1},
        lambda m, x: m.conv(x.clone().sub_(m.norm.mean).div_(m.norm.std)),
    ),
    "other words for the same": (
        {"conv2d": 1},
        lambda m, x: m.conv(torch.true_divide(torch.multiply(x, 3).subtract(1), 2)),
    ),
    "through global pooling and squeezing": (
        {"adaptive_avg_pool2d": 1, "squeeze": 2, "linear": 1},
        lambda m, x: m.head(m.pool(m.bn(x)).squeeze(-1).squeeze(-1)),
    ),
    "through global pooling and its one place": (
        {"adaptive_avg_pool2d": 1, "select": 2, "linear": 1},
        lambda m, x: m.head(m.pool(m.bn(x))[:, :, 0, 0]),
    ),
    "through places made tokens": (
        {"flatten": 1, "transpose": 1, "linear": 1},
        lambda m, x: m.head(m.bn(x).flatten(2).transpose(1, 2)),
    ),
    "through tokens made rows": (
        {"permute": 1, "reshape": 1, "linear": 1},
        lambda m, x: m.head(m.bn(x).permute(0, 2, 3, 1).reshape(-1, 3)),
    ),
    "through a window": ({"slice": 1, "conv2d": 1}, lambda m, x: m.conv(m.bn(x)[:, :, 1:, :])),
    "through a view": ({"view": 1, "linear": 1}, lambda m, x: m.wide(m.bn(x).view(2, -1))),
    "through channels last": (
        {"permute": 1, "linear": 1},
        lambda m, x: m.head(m.bn(x).permute(0, 2, 3, 1)),
    ),
    "through a smaller picture": (
        {"avg_pool2d": 1, "conv2d": 1},
        lambda m, x: m.conv(m.avg(m.bn(x))),
    ),
    "an alpha": ({"conv2d": 1}, lambda m, x: m.conv(torch.sub(x, m.norm.mean, alpha=0.3))),
    "an alpha of what is computed": (
        {"conv2d": 1},
        lambda m, x: m.conv(torch.sub(m.norm.mean, x, alpha=0.3)),
    ),
    "numbers before a linear layer": ({"linear": 1}, lambda m, x: m.row(2 * x - 1)),
}


@pytest.mark.parametrize("name", TAKES_IN)
def test_it_is_taken_in(name: str) -> None:
    left, body = TAKES_IN[name]
    result = fused(body, X, **layers())
    assert calls(result) == left, result.plan


STAYS: dict[str, tuple[str, Callable[[Model, Tensor], object]]] = {
    "a shift before padding": (
        "The zeros of its padding are not shifted",
        lambda m, x: m.padded(m.bn(x)),
    ),
    "a shift before a transposed one": ("not the same at its border", lambda m, x: m.up(x + 1)),
    "a norm that is read again": (
        "The output of `bn` is also read by",
        lambda m, x: m.conv(y := m.bn(x)).mean() + F.relu(y),
    ),
    "through a pool that pads": (
        "",
        lambda m, x: m.conv(F.avg_pool2d(m.bn(x), 3, 1, 1)),
    ),
    "another axis": ("", lambda m, x: m.row(m.bn(x))),
    "an activation between": ("", lambda m, x: m.conv(F.relu(m.bn(x)))),
}


@pytest.mark.parametrize("name", STAYS)
def test_it_stays(name: str) -> None:
    reason, body = STAYS[name]
    result = fused(body, X, "affine_layer", **layers())
    assert result.plan.fusions == ()
    assert reason in reasons(result)
