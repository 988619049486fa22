"""Whether a plan is worth carrying out for a target that folds batch norms on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchfuse.planning import FusionPlan

__all__ = ["TARGETS", "Target", "worth"]


@dataclass(frozen=True)
class Target:
    """A runtime, and the rules whose fusions its own lowering or graph optimizer does anyway."""

    name: str
    folds: frozenset[str]


_RELUS = ("conv_relu", "linear_relu")

# ExecuTorch: FuseBatchNormPass, which fails on grouped transposed convs. ONNX Runtime:
# ConvBNFusion. OpenVINO: LinOpSequenceFusion.
TARGETS = {
    "eager": Target("PyTorch eager mode", frozenset()),
    "torchscript": Target("TorchScript frozen without numeric optimization", frozenset()),
    "executorch": Target(
        "ExecuTorch's XNNPACK lowering", frozenset({"conv_bn", "linear_bn", *_RELUS})
    ),
    "onnxruntime": Target("ONNX Runtime", frozenset({"conv_bn", "conv_transpose_bn", *_RELUS})),
    "openvino": Target(
        "OpenVINO", frozenset({"conv_bn", "conv_transpose_bn", "linear_bn", *_RELUS})
    ),
}


def worth(plan: FusionPlan, target: str) -> str:
    """Return one sentence: how many of the plan's fusions `target` would not do on its own."""
    folds = TARGETS[target]
    if not plan.fusions:
        return "There is nothing to gain from fusing: no fusion was found."
    total = "1 fusion" if len(plan.fusions) == 1 else f"{len(plan.fusions)} fusions"
    gained = [fusion for fusion in plan.fusions if fusion.rule not in folds.folds]
    if not gained:
        return f"Fusing is not worth it for {folds.name}: it does all of this ({total}) itself."
    if len(gained) == len(plan.fusions):
        return f"Fusing is worth it for {folds.name}: it does none of this ({total}) itself."
    rules = ", ".join(sorted({fusion.rule for fusion in gained}))
    return (
        f"Fusing is worth it for {folds.name} only for {len(gained)} of {total} ({rules}): it does "
        "the others itself."
    )
