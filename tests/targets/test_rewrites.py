"""Rewrites for XNNPACK: each computes what was there, and leaves nothing that is not delegated."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfuse.inputs import Case
from torchfuse.targets.capturing import capture
from torchfuse.targets.executorch.lowering import lower
from torchfuse.targets.executorch.program import ExecutorchModel
from torchfuse.targets.executorch.rewrites.attention import write_attention_without_masking
from torchfuse.targets.executorch.rewrites.depthwise import (
    parts_of,
    split_large_depthwise_kernels,
)
from torchfuse.targets.executorch.rewrites.matmul import write_matmul_as_bmm
from torchfuse.targets.executorch.rewrites.mean import keep_dimensions_of_means
from torchfuse.targets.executorch.rewrites.no_ops import remove_no_op_expands
from torchfuse.targets.executorch.rewrites.selecting import write_selections_as_slices


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
    (remove_no_op_expands, Does(lambda a, *_: a.expand(2, -1, 5) * 2), qkv(2, 3, 5)),
    (keep_dimensions_of_means, Does(lambda a: a.mean((-1, 2))), IMAGE),
    (split_large_depthwise_kernels, depthwise(padding=3), IMAGE),
    (split_large_depthwise_kernels, depthwise(padding=3, stride=2, bias=False), IMAGE),
    (split_large_depthwise_kernels, depthwise(padding=(1, 2), stride=(2, 3)), IMAGE),
    (split_large_depthwise_kernels, depthwise(padding="same"), IMAGE),
]


@pytest.mark.parametrize(("rewrite", "model", "inputs"), DONE)
def test_a_rewrite_is_done_and_changes_nothing_but_rounding(
    rewrite: Any, model: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    # In float64, where a right one agrees to the last digits.
    model, given = model.double().eval(), tuple(value.double() for value in inputs)
    program = torch.export.export(model, given)
    assert rewrite(program) > 0
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    program.graph.lint()
    torch.testing.assert_close(program.module()(*given), model(*given), rtol=1e-6, atol=1e-7)


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
    # expanding something
    (remove_no_op_expands, Does(lambda a, *_: a[:, :1].expand(2, 3, 5) * 2), qkv(2, 3, 5)),
    (keep_dimensions_of_means, Does(lambda a: a.mean((1, 2))), IMAGE),
    (keep_dimensions_of_means, Does(lambda a: a.mean((2, 3), keepdim=True)), IMAGE),
    (split_large_depthwise_kernels, depthwise(), IMAGE),  # the core would be padded by −1
    (split_large_depthwise_kernels, depthwise(padding=6, dilation=2), (torch.randn(1, 8, 20, 20),)),
    (split_large_depthwise_kernels, nn.Conv2d(8, 8, 7, padding=3), IMAGE),
    (split_large_depthwise_kernels, nn.Conv2d(8, 8, 5, padding=2, groups=8), IMAGE),
    (split_large_depthwise_kernels, nn.Conv2d(8, 8, 9, padding=4, groups=8), IMAGE),
]


@pytest.mark.parametrize(("rewrite", "model", "inputs"), LEFT)
def test_what_a_rewrite_is_not_about_is_left_alone(
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


def test_sizes_that_are_dynamic_are_left_as_they_are() -> None:
    sizes = ({0: torch.export.Dim("n", max=8)},)
    program = capture(Attention().eval(), Case((torch.randn(2, 5, 8),)), sizes)
    names = [str(node.target) for node in program.graph.nodes]
    assert any("scaled_dot_product_attention" in name for name in names)
