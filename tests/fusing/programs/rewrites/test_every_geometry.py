"""All rules at once over every kind of convolution: what is merged, and that it is exact."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import torchfuse
from support.rewriting_checks import Model, calls, compare, fused, rules

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]

X = torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(0))

# What becomes of a convolution that is scaled and shifted before and after, chained with a 1×1 one,
# and added to another of its kind: the layers that are left, of five.
GEOMETRIES: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({"kernel_size": 3}, 3),
    "padded": ({"kernel_size": 3, "padding": 1}, 3),
    "strided": ({"kernel_size": 3, "stride": 2, "padding": 1}, 3),
    "oblong": ({"kernel_size": (3, 1), "stride": (1, 2), "padding": (1, 0)}, 3),
    "dilated": ({"kernel_size": 3, "dilation": 2, "padding": 2}, 3),
    "grouped": ({"kernel_size": 3, "groups": 2, "padding": 1}, 4),
    "depthwise": ({"kernel_size": 3, "groups": 8, "padding": 1}, 4),
    "depthwise, two for each": ({"kernel_size": 3, "groups": 8, "out_channels": 16}, 4),
    "of the same size": ({"kernel_size": 3, "padding": "same"}, 3),
    "of the same size, padded on one side more": ({"kernel_size": 2, "padding": "same"}, 5),
    "valid": ({"kernel_size": 3, "padding": "valid"}, 3),
    "reflecting": ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, 5),
    "circular": ({"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, 5),
}


def of(settings: dict[str, Any], **layers: bool) -> dict[str, nn.Module]:
    given = {"in_channels": 8, "out_channels": 8, **settings}
    return {name: nn.Conv2d(**given, bias=bias) for name, bias in layers.items()}


def body(m: Model, x: Tensor) -> object:
    return m.a(3 * x) * 2 + 1, m.d(m.p(x)), m.b(x) - m.c(x)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolutions_of_this_kind(name: str) -> None:
    settings, left = GEOMETRIES[name]
    point = nn.Conv2d(8, 8, 1, bias=False)
    result = fused(body, X, p=point, **of(settings, a=True, b=False, c=True, d=True))
    assert sum(n for call, n in calls(result).items() if call.startswith("conv")) == left, (
        result.plan
    )


@pytest.mark.parametrize(
    "settings", [{}, {"stride": 2}, {"groups": 2, "output_padding": 1, "stride": 2}]
)
def test_transposed_convolutions(settings: dict[str, Any]) -> None:
    layers = {n: nn.ConvTranspose2d(8, 6, 3, padding=1, **settings) for n in "abc"}
    result = fused(lambda m, x: (m.a(3 * x) * 2 + 1, m.b(x) + m.c(x)), X, **layers)
    assert calls(result) == {"conv_transpose2d": 2}, result.plan


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_of_other_dimensions(dims: int) -> None:
    conv = nn.Conv1d if dims == 1 else nn.Conv3d
    layers = {n: conv(8, 8, 3, padding=1, bias=n != "b") for n in "abcd"}
    x = torch.randn(2, 8, *[5] * dims)
    result = fused(body, x, p=conv(8, 8, 1, bias=False), **layers)
    assert calls(result) == {f"conv{dims}d": 3}, result.plan


def test_a_batch_of_one_and_no_batch_at_all() -> None:
    def short(m: Model, x: Tensor) -> object:
        return m.a(3 * x) * 2 + 1, m.b(x) - m.c(x)

    for x in (X[:1], X[0]):
        result = fused(short, x, **of({"kernel_size": 3, "padding": 1}, a=True, b=False, c=True))
        assert calls(result) == {"conv2d": 2}, result.plan


def test_sizes_that_were_declared_dynamic() -> None:
    sizes = {"x": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}
    layers = of({"kernel_size": 3, "padding": 1}, a=True, b=False, c=True, d=True)
    result = fused(body, X, dynamic=sizes, p=nn.Conv2d(8, 8, 1, bias=False), **layers)
    assert calls(result) == {"conv2d": 3}, result.plan
    model = Model(body, p=nn.Conv2d(8, 8, 1, bias=False), **layers).eval()
    program = torch.export.export(model, (X,), dynamic_shapes=sizes)
    compare(program, torchfuse.fuse_exported(program).model, torch.randn(3, 8, 5, 12), 1e-4)


def test_channels_last_stays_channels_last() -> None:
    last = X.to(memory_format=torch.channels_last)
    result = fused(
        lambda m, x: m.a(x) + m.b(x), last, **of({"kernel_size": 3, "padding": 1}, a=True, b=False)
    )
    assert calls(result) == {"conv2d": 1}
    assert result.model.module()(last).is_contiguous(memory_format=torch.channels_last)


def test_a_weight_that_two_layers_share_is_kept_for_the_other() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    result = fused(
        lambda m, x: (m.a(x) * 2, m.b(x) + m.c(x), torch.relu(m.a(torch.relu(x)))),
        X,
        a=conv,
        b=conv,
        c=nn.Conv2d(8, 8, 1),
    )
    assert calls(result)["conv2d"] == 3, result.plan
    assert rules(result) == ["layer_affine", "branches"]


def test_what_is_also_an_output_stays() -> None:
    def both(m: Model, x: Tensor) -> object:
        a, b = m.a(x), m.b(x)
        return a, a + b

    result = fused(both, X, **of({"kernel_size": 3, "padding": 1}, a=True, b=False))
    assert calls(result)["conv2d"] == 2


def test_buffers_and_frozen_parameters_keep_their_kind() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randn(8, 8, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, padding=1)

    result = fused(lambda m, x: m.f(x) * 2 + 1, X, f=Frozen())
    assert calls(result) == {"conv2d": 1}
    assert dict(result.model.named_parameters()) == {}
    layers = of({"kernel_size": 3, "padding": 1}, a=True, b=False)
    for layer in layers.values():
        layer.requires_grad_(False)
    result = fused(lambda m, x: m.a(x) + m.b(x), X, **layers)
    assert {p.requires_grad for _, p in result.model.named_parameters()} == {False}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_over_all_rules(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = of({"kernel_size": 3, "padding": 1}, a=True, b=False, c=True, d=True)
    model = Model(body, p=nn.Conv2d(8, 8, 1, bias=False), **layers).eval().to(dtype)
    program = torch.export.export(model, (X.to(dtype),))
    result = torchfuse.fuse_exported(program)
    assert calls(result) == {"conv2d": 3}, result.plan
    assert {tensor.dtype for tensor in result.model.state_dict.values()} == {dtype}
    compare(program, result.model, X.to(dtype), 5e-2)
