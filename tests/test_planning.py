import json
import math
import subprocess
import sys
from dataclasses import replace

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


def test_a_plan_with_an_infinite_difference_is_json_that_every_reader_takes():
    fusion = replace(PLAN.fusions[0], max_rel=math.inf)
    plan = replace(PLAN, fusions=(fusion,))
    assert "Infinity" not in plan.to_json()
    assert json.loads(plan.to_json())["fusions"][0]["max_rel"] == sys.float_info.max
    assert FusionPlan.from_json(plan.to_json()) == plan


def test_totals_count_what_is_known():
    assert PLAN.parameters_saved == 24
    assert PLAN.traffic_saved_bytes == 1024
    assert PLAN.macs_saved == 256


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\xff",
        '{"format": "torchfuse-plan-1", "model": 1}',
        "[]",
        "{}",
        '{"format": "torchfuse-plan-0"}',
        "null",
    ],
)
def test_text_that_is_not_a_plan_is_an_error(text):
    with pytest.raises(InputError, match=r"Expected what FusionPlan\.to_json\(\) writes"):
        FusionPlan.from_json(text)


def test_plans_and_comparisons_import_without_torch():
    code = (
        "import sys, torchfuse.planning, torchfuse.verifying.equivalence\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
