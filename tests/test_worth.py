"""Whether fusing is worth it depends on what the target does on its own."""

import pytest
import torch
from torch import Tensor, nn

from torchfuse.planning import Fusion, FusionPlan
from torchfuse.worth import TARGETS, worth


def plan(*rules: str) -> FusionPlan:
    return FusionPlan("Net", (), tuple(Fusion(rule, ("a", "b"), 0, 0, 0) for rule in rules), ())


@pytest.mark.parametrize("target", ["executorch", "onnxruntime", "openvino"])
def test_a_target_that_folds_batch_norms_itself_gains_nothing(target: str) -> None:
    name = TARGETS[target].name
    assert worth(plan("conv_bn", "conv_bn"), target) == (
        f"Fusing is not worth it for {name}: it does all of this (2 fusions) itself."
    )


@pytest.mark.parametrize("target", ["eager", "torchscript"])
def test_a_target_that_folds_nothing_gains_all(target: str) -> None:
    expected = (
        f"Fusing is worth it for {TARGETS[target].name}: it does none of this (1 fusion) itself."
    )
    assert worth(plan("conv_bn"), target) == expected


def test_what_the_target_leaves_is_counted() -> None:
    sentence = worth(plan("conv_bn", "linear_bn", "conv_bn"), "onnxruntime")
    assert sentence == (
        "Fusing is worth it for ONNX Runtime only for 1 of 3 fusions (linear_bn): it does "
        "the others itself."
    )


def test_no_fusion_is_nothing_to_gain() -> None:
    assert worth(plan(), "eager") == "There is nothing to gain from fusing: no fusion was found."


class _Block(nn.Module):
    def __init__(self, layer: nn.Module, norm: nn.Module):
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


BLOCKS = {
    "conv_bn": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), torch.randn(1, 3, 8, 8)),
    "conv_transpose_bn": (
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.BatchNorm2d(6),
        torch.randn(1, 4, 8, 8),
    ),
    "linear_bn": (nn.Linear(3, 4), nn.BatchNorm1d(4), torch.randn(5, 3)),
}


def _lowered_by_executorch(rule: str) -> str:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    layer, norm, inputs = BLOCKS[rule]
    program = torch.export.export(_Block(layer, norm).eval(), (inputs,))
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    return str(edge.exported_program().graph_module.code)


@pytest.mark.filterwarnings("ignore")  # ExecuTorch's own
@pytest.mark.parametrize("rule", ["conv_bn", "linear_bn"])
def test_executorch_folds_by_itself_what_the_table_says(rule: str) -> None:
    assert rule in TARGETS["executorch"].folds
    assert "batch_norm" not in _lowered_by_executorch(rule)


@pytest.mark.filterwarnings("ignore")  # ExecuTorch's own
def test_executorch_fails_on_a_grouped_transposed_conv_which_is_not_in_the_table() -> None:
    assert "conv_transpose_bn" not in TARGETS["executorch"].folds
    with pytest.raises(Exception, match="FuseBatchNormPass"):
        _lowered_by_executorch("conv_transpose_bn")


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize("rule", BLOCKS)
def test_torchscript_frozen_folds_none_of_them(rule: str) -> None:
    layer, norm, inputs = BLOCKS[rule]
    traced = torch.jit.trace(_Block(layer, norm).eval(), inputs)
    frozen = torch.jit.freeze(traced, optimize_numerics=False)
    assert ("batch_norm" not in str(frozen.inlined_graph)) == (rule in TARGETS["torchscript"].folds)
