"""A scale and a shift per channel are taken into the layer before them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.rewriting_checks import Model, calls, fused, reasons

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

X = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))


class FrozenBatchNorm2d(nn.Module):
    """As torchvision writes it."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("weight", torch.rand(channels) + 0.5)
        self.register_buffer("bias", torch.randn(channels))
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        variance = self.running_var.reshape(1, -1, 1, 1)
        scale = w * (variance + 1e-5).rsqrt()
        return x * scale + (b - self.running_mean.reshape(1, -1, 1, 1) * scale)


class Scale(nn.Module):
    def __init__(self, *shape: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {
        "conv": nn.Conv2d(4, 8, 3, 2, 1),
        "plain": nn.Conv2d(4, 8, 1, bias=False),
        "up": nn.ConvTranspose2d(4, 8, 2, 2, groups=2),
        "line": nn.Linear(5, 8),
        "frozen": FrozenBatchNorm2d(8),
        "bn": nn.BatchNorm2d(8),
        "scale": Scale(8, 1, 1),
        "scalar": Scale(),
        "last": Scale(8),
        "drop": nn.Dropout(),
        "tall": Scale(6, 1),
    }


TAKES_IN: dict[str, tuple[str, Callable[[Model, Tensor], object]]] = {
    "layer scale": ("conv2d", lambda m, x: m.scale(m.conv(x))),
    "layer scale behind dropout": ("conv2d", lambda m, x: m.scale(m.drop(m.conv(x)))),
    "a learned scalar": ("conv2d", lambda m, x: m.scalar(m.conv(x))),
    "numbers": ("conv2d", lambda m, x: 3 - (2 * m.conv(x) + 1) / 4),
    "numbers in place": ("conv2d", lambda m, x: m.conv(x).mul_(2).add_(1).sub_(3).div_(5)),
    "a negation": ("conv2d", lambda m, x: -m.plain(x)),
    "a sum times a number": ("conv2d", lambda m, x: torch.add(m.plain(x), m.scale.gamma, alpha=2)),
    "rsub": ("conv2d", lambda m, x: torch.rsub(m.conv(x), 2.0, alpha=3)),
    "a frozen batch norm": ("conv2d", lambda m, x: m.frozen(m.conv(x))),
    "a batch norm behind arithmetic": ("conv2d", lambda m, x: m.bn(m.conv(x).add_(1))),
    "a transposed convolution": ("conv_transpose2d", lambda m, x: m.scale(m.up(x))),
    "a linear layer": ("linear", lambda m, x: m.last(m.line(x))),
    "a scalar behind what heads of attention are made by": (
        "linear",
        lambda m, x: m.scalar(m.line(x).reshape(2, 4, 6, 2, 4).transpose(2, 3)),
    ),
    "layer scale of places made tokens": (
        "conv2d",
        lambda m, x: m.last(m.conv(x).flatten(2).transpose(1, 2)),
    ),
    "a product with a matrix": ("linear", lambda m, x: m.last(x @ m.line.weight.t()) + 1),
}


@pytest.mark.parametrize("name", TAKES_IN)
def test_it_is_taken_in(name: str) -> None:
    layer, body = TAKES_IN[name]
    result = fused(body, X, **layers())
    left = calls(result)
    assert left.pop(layer) == 1, result.plan
    assert not {"mul", "add", "batch_norm"} & left.keys()


STAYS: dict[str, tuple[str, Callable[[Model, Tensor], object]]] = {
    "another axis": ("", lambda m, x: m.tall(m.line(x))),
    "more than one axis": ("", lambda m, x: m.line(x) * m.line.weight[:6, :1].expand(6, 8)),
    "a factor that is computed": ("", lambda m, x: m.conv(x) * x.mean()),
    "a factor that makes it larger": ("", lambda m, x: m.tall(m.line(x[:, :, :1]))),
    "channels that heads were made of": (
        "",
        lambda m, x: m.line(x).reshape(2, 4, 6, 2, 4) * m.line.weight[:4, 0].detach(),
    ),
    "a layer whose transpose is read again": (
        "is also read by",
        lambda m, x: (m.scalar(y := m.line(x).transpose(1, 2)), F.relu(y)),
    ),
    "a layer that is read again": (
        "The output of `conv` is also read by",
        lambda m, x: m.scale(y := m.conv(x)) + F.relu(y),
    ),
    "a number divided by it": ("", lambda m, x: 1 / m.conv(x)),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_it_stays(name: str) -> None:
    reason, body = STAYS[name]
    result = fused(body, X, "layer_affine", **layers())
    assert result.plan.fusions == ()
    assert reason in reasons(result)


def test_a_factor_that_the_program_changes_stays() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.register_buffer("factor", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            self.factor.add_(1)
            return self.conv(x) * self.factor

    import torchfuse

    program = torch.export.export(Counting().eval(), (X,))
    assert torchfuse.fuse_exported(program, verify=False).plan.fusions == ()


def test_half_precision_is_merged_too() -> None:
    import torchfuse

    model = Model(lambda m, x: m.scale(m.conv(x)) + 1, **layers()).eval().to(torch.bfloat16)
    program = torch.export.export(model, (X.to(torch.bfloat16),))
    result = torchfuse.fuse_exported(program)
    assert calls(result) == {"conv2d": 1}
    assert result.check.passed


def test_a_weight_that_the_dtype_cannot_hold_is_refused() -> None:
    import torchfuse

    model = Model(lambda m, x: m.conv(x) * 60000 * 60000, **layers()).eval().half()
    result = torchfuse.fuse_exported(torch.export.export(model, (X.half(),)), verify=False)
    assert "too large for torch.float16" in reasons(result)
