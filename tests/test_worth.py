"""Whether fusing is worth it depends on what the target does on its own."""

import pytest

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
