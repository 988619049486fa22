"""What the report of quantizing says: on what data each figure is, and JSON that is JSON."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import torchfuse
from torchfuse.quantizing.quantization_report import Accuracy, Calibrated, QuantizationReport

REPORT = QuantizationReport(
    "int8",
    Calibrated("'x.npy'", 16, True, 0.01),
    20.25,
    layers=(),
    recovery=(),
    accuracy=(
        Accuracy("map50", 0.5, 0.25),
        Accuracy("agreement", 100.0, 93.75, "the 16 calibration samples themselves"),
    ),
    notes=(),
)


def test_figures_on_the_calibration_data_say_so():
    lines = str(REPORT).splitlines()
    assert lines[0] == (
        "Quantized: int8, outputs at 20.2 dB on the 16 calibration samples themselves"
    )
    assert lines[-2:] == [
        "map50: 0.5 before, 0.25 after",
        "agreement: 100 % before, 93.75 % after, on the 16 calibration samples themselves",
    ]


def test_a_share_of_samples_has_its_interval():
    share = Accuracy("top-1", 90.0, 85.0, "the 20 given samples", 20, 64.0, 94.8)
    assert str(replace(REPORT, accuracy=(share,))).splitlines()[-1] == (
        "top-1: 90 % before, 85 % after (95 % interval 64.0 … 94.8), on the 20 given samples"
    )


def test_outputs_that_are_equal_have_a_number_in_json():
    report = QuantizationReport("int8", None, math.inf, (), (), (), ())
    assert json.loads(report.to_json())["sqnr_db"] == sys.float_info.max


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 8) for _ in range(4)]


MODEL = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def closeness(_: nn.Module) -> float:
    return 1.0


def test_what_was_measured_on_the_calibration_data_is_named_and_the_users_own_measure_is_not(
    inputs,
):
    report = torchfuse.quantize(MODEL, inputs[0], inputs, evaluate=closeness).report
    assert [(a.measure, a.data) for a in report.accuracy] == [
        ("closeness", None),
        ("agreement", "the 4 calibration samples themselves"),
    ]


def test_data_that_nothing_is_calibrated_on_is_not_called_calibration_data(inputs):
    labels = torch.tensor([0, 1, 2, 0])
    report = torchfuse.quantize(
        MODEL, inputs[0], inputs, scheme="int8_dynamic", labels=labels
    ).report
    assert {a.data for a in report.accuracy} == {"the 4 given samples"}
    assert "on the 4 given samples" in str(report).splitlines()[0]
