import subprocess
import sys

import pytest

from torchfuse.errors import InputError
from torchfuse.planning import Fusion, FusionPlan, Skip

PLAN = FusionPlan(
    model="ResNet",
    scope=("Holds for forward(1×3×8×8).",),
    fusions=(
        Fusion("conv_bn", ("conv1", "bn1"), 32, 1024, 256, 1e-7),
        Fusion("linear_bn", ("fc", "bn2"), -8, None, None),
    ),
    skips=(Skip(("bn3",), "Its input is the sum of two branches.", "", "conv_bn"),),
    originals_bytes=0,
)


def test_a_plan_survives_json():
    assert FusionPlan.from_json(PLAN.to_json()) == PLAN


def test_totals_count_what_is_known():
    assert PLAN.parameters_saved == 24
    assert PLAN.traffic_saved_bytes == 1024
    assert PLAN.macs_saved == 256


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "torchfuse-plan-0"}', "null"])
def test_text_that_is_not_a_plan_is_an_error(text):
    with pytest.raises(InputError, match=r"Expected a plan as FusionPlan\.to_json"):
        FusionPlan.from_json(text)


def test_plans_and_comparisons_import_without_torch():
    code = (
        "import sys, torchfuse.planning, torchfuse.equivalence; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
