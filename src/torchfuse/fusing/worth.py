"""Whether a plan is worth carrying out for a target that does some of it on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchfuse.units import size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchfuse.planning import Fusion, FusionPlan

__all__ = ["TARGETS", "FoldingRuntime", "worth"]


@dataclass(frozen=True)
class FoldingRuntime:
    """A runtime, and the rules whose fusions its own lowering or graph optimizer does anyway."""

    name: str
    folds: frozenset[str]


# What their graph optimizers take out, and into a convolution, of what is no batch norm
_OPTIMIZED = frozenset({"no_op", "layer_affine", "pad_conv"})

# ExecuTorch: FuseBatchNormPass, which fails on grouped transposed convs. ONNX Runtime:
# ConvBNFusion, ConvMulFusion, ConvAddFusion, PadFusion. OpenVINO: LinOpSequenceFusion, and any
# number of elementwise calls in one.
TARGETS = {
    "eager": FoldingRuntime("PyTorch eager mode", frozenset()),
    "torchscript": FoldingRuntime("TorchScript frozen without numeric optimization", frozenset()),
    "executorch": FoldingRuntime(
        "ExecuTorch's XNNPACK lowering", frozenset({"conv_bn", "linear_bn"})
    ),
    "onnxruntime": FoldingRuntime(
        "ONNX Runtime", frozenset({"conv_bn", "conv_transpose_bn"}) | _OPTIMIZED
    ),
    "openvino": FoldingRuntime(
        "OpenVINO",
        frozenset({"conv_bn", "conv_transpose_bn", "linear_bn", "affine_chain"}) | _OPTIMIZED,
    ),
}


def worth(plan: FusionPlan, target: str) -> str:
    """Return one sentence: how many of the plan's fusions `target` would not do on its own.

    And what those save, in the first case, as far as it is known.
    """
    folds = TARGETS[target]
    if not plan.fusions:
        return "There is nothing to gain from fusing: no fusion was found."
    total = "1 fusion" if len(plan.fusions) == 1 else f"{len(plan.fusions)} fusions"
    gained = [fusion for fusion in plan.fusions if fusion.rule not in folds.folds]
    if not gained:
        return f"Fusing is not worth it for {folds.name}: it does all of this ({total}) itself."
    if len(gained) == len(plan.fusions):
        return (
            f"Fusing is worth it for {folds.name}: it does none of this ({total}) itself"
            f"{_saved(gained)}."
        )
    rules = ", ".join(sorted({fusion.rule for fusion in gained}))
    return (
        f"Fusing is worth it for {folds.name} only for {len(gained)} of {total} ({rules}): it does "
        f"the others itself{_saved(gained)}."
    )


def _saved(fusions: Sequence[Fusion]) -> str:
    """What fusions save, as the end of a sentence; empty if nothing is known of it."""
    macs = sum(fusion.macs_saved or 0 for fusion in fusions)
    traffic = sum(fusion.traffic_saved_bytes or 0 for fusion in fusions)
    if macs <= 0 and traffic <= 0:
        return ""
    return f"; that saves {macs:,} multiply-adds and {size(max(traffic, 0))} of memory traffic"
