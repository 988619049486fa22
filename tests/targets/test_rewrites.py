"""Rewrites for XNNPACK: each computes what was there, and leaves nothing that is not delegated."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchfuse
from torchfuse.cases import Case
from torchfuse.lowering.capture import capture
from torchfuse.lowering.xnnpack_rewrites import REWRITES, REWRITES_ONCE_QUANTIZED
from torchfuse.lowering.xnnpack_rewrites.attention import write_attention_without_masking
from torchfuse.lowering.xnnpack_rewrites.depthwise import parts_of, split_large_depthwise_kernels
from torchfuse.lowering.xnnpack_rewrites.group_norm import write_out_group_norms
from torchfuse.lowering.xnnpack_rewrites.hardsigmoid import write_out_hardsigmoids
from torchfuse.lowering.xnnpack_rewrites.layer_norm import write_out_layer_norms
from torchfuse.lowering.xnnpack_rewrites.matmul import write_matmul_as_bmm
from torchfuse.lowering.xnnpack_rewrites.maximum import write_maxima_as_poolings
from torchfuse.lowering.xnnpack_rewrites.mean import (
    keep_dimensions_of_means,
    write_means_over_channels_as_convolutions,
)
from torchfuse.lowering.xnnpack_rewrites.padding import leave_padding_in_int8
from torchfuse.lowering.xnnpack_rewrites.selecting import write_selections_as_slices
from torchfuse.lowering.xnnpack_rewrites.softmax import write_softmax_of_rows
from torchfuse.lowering.xnnpack_rewrites.upsampling import write_upsampling_as_concatenations
from torchfuse.targets.executorch.program import ExecutorchModel
from torchfuse.targets.executorch.xnnpack import lower


class Does(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def qkv(*shape: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for _ in range(3))


def depthwise(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(8, 8, 7, groups=8, **options)


def scaled(norm: nn.Module) -> nn.Module:
    """A norm whose weights hide nothing."""
    torch.manual_seed(0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


class OverChannels(nn.Module):
    """A layer norm over the channels of an image, as ConvNeXt has it."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = scaled(norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * 2


IMAGE = qkv(1, 8, 12, 11)[:1]

DONE = [
    (write_attention_without_masking, Does(F.scaled_dot_product_attention), qkv(2, 3, 5, 4)),
    (write_attention_without_masking, Does(F.scaled_dot_product_attention), qkv(3, 5, 4)),
    (
        write_attention_without_masking,
        Does(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3)),
        qkv(2, 3, 5, 4),
    ),
    (write_matmul_as_bmm, Does(lambda a, b, _: a @ b.transpose(-1, -2)), qkv(2, 3, 5, 4)),
    (write_selections_as_slices, Does(lambda a, *_: a[:, -2] + 1), qkv(2, 3, 5)),
    (write_selections_as_slices, Does(lambda a, *_: sum(a.unbind(1))), qkv(2, 3, 5)),
    (keep_dimensions_of_means, Does(lambda a: a.mean((-1, 2))), IMAGE),
    (split_large_depthwise_kernels, depthwise(padding=3), IMAGE),
    (split_large_depthwise_kernels, depthwise(padding=3, stride=2, bias=False), IMAGE),
    (split_large_depthwise_kernels, depthwise(padding=(1, 2), stride=(2, 3)), IMAGE),
    (split_large_depthwise_kernels, depthwise(padding="same"), IMAGE),
    (write_maxima_as_poolings, Does(lambda a: a.amax((3, -2), keepdim=True)), IMAGE),
    (write_maxima_as_poolings, Does(lambda a: a.amax((2, 3)) + 1), IMAGE),
    (write_maxima_as_poolings, Does(lambda a: F.adaptive_max_pool2d(a, 1)), IMAGE),
    (write_maxima_as_poolings, Does(lambda a: F.adaptive_max_pool2d(a, (4, 11))), IMAGE),
    (write_softmax_of_rows, Does(lambda a: a.softmax(1)), IMAGE),
    (write_softmax_of_rows, Does(lambda a: a.softmax(-2)), IMAGE),
    (write_softmax_of_rows, Does(lambda a: a.softmax(-1)), IMAGE),
    (write_softmax_of_rows, Does(lambda a, *_: a.softmax(0)), qkv(5, 3)),
    (write_out_hardsigmoids, Does(lambda a: F.hardsigmoid(3 * a)), IMAGE),
    (write_upsampling_as_concatenations, nn.Upsample(scale_factor=2.0), (torch.randn(2, 3, 4, 5),)),
    (write_upsampling_as_concatenations, nn.Upsample((12, 33)), IMAGE),
    (write_upsampling_as_concatenations, nn.Upsample((36, 11), mode="nearest-exact"), IMAGE),
]

# In float32 only, since in float64 nobody lowers them.
DONE_IN_FLOAT32 = [
    (write_out_layer_norms, scaled(nn.LayerNorm(11)), IMAGE),
    (write_out_layer_norms, nn.LayerNorm(11, 0.5, elementwise_affine=False), IMAGE),
    (write_out_layer_norms, OverChannels(nn.LayerNorm(8, 0.5)), IMAGE),
    (write_out_layer_norms, OverChannels(nn.LayerNorm(8, bias=False)), IMAGE),
    (
        write_out_layer_norms,
        Does(lambda a, *_: F.layer_norm(a.permute(2, 0, 1), (3,))),
        qkv(2, 3, 5),
    ),
    (write_out_group_norms, scaled(nn.GroupNorm(2, 8, 0.5)), IMAGE),
    (write_out_group_norms, scaled(nn.GroupNorm(8, 8)), IMAGE),
    (write_out_group_norms, nn.GroupNorm(1, 8, affine=False), IMAGE),
    (write_means_over_channels_as_convolutions, Does(lambda a: a.mean(1, keepdim=True)), IMAGE),
    (write_means_over_channels_as_convolutions, Does(lambda a: a.mean(-3)), IMAGE),
]


@pytest.mark.parametrize(("rewrite", "model", "inputs"), DONE)
def test_a_rewrite_is_done_and_changes_nothing_but_rounding(
    rewrite: Any, model: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    # In float64, where a right one agrees to the last digits.
    model, given = model.double().eval(), tuple(value.double() for value in inputs)
    torch.testing.assert_close(
        rewritten(rewrite, model, given)(*given), model(*given), rtol=1e-6, atol=1e-7
    )


def rewritten(rewrite: Any, model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    program = torch.export.export(model, inputs)
    assert rewrite(program) > 0
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    program.graph.lint()
    return program.module()


@pytest.mark.parametrize(("rewrite", "model", "inputs"), DONE_IN_FLOAT32)
def test_a_rewrite_of_float32_is_done_and_changes_nothing_but_rounding(
    rewrite: Any, model: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    made = rewritten(rewrite, model.eval(), inputs)
    torch.testing.assert_close(made(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


LEFT = [
    # with a mask, rows may be masked altogether; causal ones, dropout and groups likewise
    (
        write_attention_without_masking,
        Does(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
        qkv(2, 3, 5, 4),
    ),
    (
        write_attention_without_masking,
        Does(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(5, 5))),
        qkv(2, 3, 5, 4),
    ),
    # a stack that is broadcast
    (write_matmul_as_bmm, Does(lambda a, b, _: a @ b[:1].transpose(-1, -2)), qkv(2, 3, 5, 4)),
    # indices, which portable kernels take
    (write_selections_as_slices, Does(lambda a, *_: a.argmax(2)[:, 0]), qkv(2, 3, 5)),
    (keep_dimensions_of_means, Does(lambda a: a.mean((1, 2))), IMAGE),
    (keep_dimensions_of_means, Does(lambda a: a.mean((2, 3), keepdim=True)), IMAGE),
    (split_large_depthwise_kernels, depthwise(), IMAGE),  # the core would be padded by −1
    (split_large_depthwise_kernels, depthwise(padding=6, dilation=2), (torch.randn(1, 8, 20, 20),)),
    (split_large_depthwise_kernels, nn.Conv2d(8, 8, 7, padding=3), IMAGE),
    (split_large_depthwise_kernels, nn.Conv2d(8, 8, 5, padding=2, groups=8), IMAGE),
    (split_large_depthwise_kernels, nn.Conv2d(8, 8, 9, padding=4, groups=8), IMAGE),
    # poolings that divide nothing evenly; indices that somebody reads; other axes
    (write_maxima_as_poolings, Does(lambda a: F.adaptive_max_pool2d(a, 5)), IMAGE),
    (write_maxima_as_poolings, Does(lambda a: nn.AdaptiveMaxPool2d(1, True)(a)[1]), IMAGE),
    (write_maxima_as_poolings, Does(lambda a: a.amax((1, 2))), IMAGE),
    (write_softmax_of_rows, Does(lambda a, *_: a.softmax(-1)), qkv(2, 3, 5)),
    (write_upsampling_as_concatenations, nn.Upsample((18, 22)), IMAGE),
    (write_out_layer_norms, nn.LayerNorm((12, 11)), IMAGE),
    (write_out_layer_norms, nn.LayerNorm(11).half(), (IMAGE[0].half(),)),  # d² may be too large
    (write_out_group_norms, nn.GroupNorm(2, 8), qkv(2, 8, 5)[:1]),
    (write_means_over_channels_as_convolutions, Does(lambda a: a.mean((1, 2))), IMAGE),
]


@pytest.mark.parametrize(("rewrite", "model", "inputs"), LEFT)
def test_what_a_rewrite_is_not_about_is_skipped(
    rewrite: Any, model: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    program = torch.export.export(model.eval(), inputs)
    assert rewrite(program) == 0


def test_each_weight_of_a_split_kernel_is_in_one_part_at_its_place() -> None:
    weight = torch.arange(1.0, 50.0).reshape(1, 1, 7, 7)
    whole = torch.zeros(7, 7)
    for values, (down, right), (above, left) in parts_of(weight):
        for row, column in ((r, c) for r in range(values.shape[2]) for c in range(values.shape[3])):
            whole[above + row * down, left + column * right] += values[0, 0, row, column]
    assert torch.equal(whole, weight[0, 0])


class Attention(nn.Module):
    """As in a ViT: q, k and v of one linear layer, taken apart by unbind."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        return self.out(mixed)[:, 0]


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 7, padding=3, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "x"), [(Attention(), torch.randn(2, 5, 8)), (Stage(), torch.randn(1, 8, 12, 12))]
)
def test_xnnpack_takes_the_whole_in_one_piece(model: nn.Module, x: Tensor) -> None:
    lowered = lower(capture(model.eval(), Case((x,))))
    assert (lowered.delegation.calls_left, lowered.delegation.partitions) == (0, 1)
    loaded = ExecutorchModel(lowered.program, lowered.signature)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


class Padded(nn.Module):
    """Padding as TensorFlow has it, more below and right than above and left."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, groups=8)
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.second(F.pad(x, (0, 1, 0, 1), value=self.value))


def quantized(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    int8 = torchfuse.quantize(model.eval(), x, [x, x - 0.5], recovery=()).model
    return capture(int8, Case((x,)))


def test_padding_with_zeros_stays_in_int8_inside_the_delegate() -> None:
    x = torch.randn(1, 3, 12, 12)
    program = quantized(Padded(), x)
    expected = program.module()(x)
    assert leave_padding_in_int8(program) == 1
    program.graph_module.recompile()
    assert torch.equal(program.module()(x), expected)
    lowered = lower(program)
    assert lowered.delegation.conversions == ()
    assert "Inside the delegate" not in str(lowered.delegation)


def test_padding_with_another_number_is_left_in_float_and_the_report_says_so() -> None:
    program = quantized(Padded(0.25), torch.randn(1, 3, 12, 12))
    assert leave_padding_in_int8(program) == 0
    lowered = lower(program)
    (conversion,) = lowered.delegation.conversions
    assert (conversion.around, conversion.inside) == (("constant_pad_nd",), True)
    assert (
        "Inside the delegate int8 becomes float and int8 again once, around:\n  constant_pad_nd, "
        in str(lowered.delegation)
    )


class Ends(nn.Module):
    """Something after a convolution, whose output XNNPACK keeps in channels_last."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 8, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.softmax(3),  # ExecuTorch 1.5.1 takes it over the channels
        lambda x: x.softmax(1),
        lambda x: F.group_norm(x, 2),
        lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2),
        lambda x: x * x.mean(1, keepdim=True),
        lambda x: F.adaptive_max_pool2d(x, 1),  # ExecuTorch 1.5.1 cannot lower it
        lambda x: x * F.hardsigmoid(x.amax((2, 3), keepdim=True)),
        lambda x: torch.cat([F.interpolate(x, scale_factor=2.0), F.interpolate(x, (12, 10))], 1),
    ],
)
def test_what_follows_a_convolution_is_in_one_piece_with_it_and_right(function: Any) -> None:
    torch.manual_seed(0)
    model, x = Ends(function).eval(), torch.randn(1, 3, 6, 5)
    lowered = lower(capture(model, Case((x,))))
    assert (lowered.delegation.calls_left, lowered.delegation.partitions) == (0, 1)
    loaded = ExecutorchModel(lowered.program, lowered.signature)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


def test_every_rewrite_is_measured_by_the_benchmark() -> None:
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    measured = runpy.run_path(str(folder / "rewrites.py"))["MODELS"]
    named = {each.__name__ for each in (*REWRITES, *REWRITES_ONCE_QUANTIZED)}
    assert {name.partition(",")[0] for name in measured} == named


def test_sizes_that_are_dynamic_are_left_as_they_are() -> None:
    sizes = ({0: torch.export.Dim("n", max=8)},)
    program = capture(Attention().eval(), Case((torch.randn(2, 5, 8),)), sizes)
    names = [str(node.target) for node in program.graph.nodes]
    assert any("scaled_dot_product_attention" in name for name in names)
