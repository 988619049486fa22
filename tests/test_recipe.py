"""The recipe's example model and the digits net, end to end; MobileNetV2 takes the demo's time."""

import json

import pytest
import torch

from torchfuse import recipe
from torchfuse.comparing.comparison import FOLDED, NOT_FUSED
from torchfuse.errors import ArtifactError
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.serialization import to_json
from torchfuse.targets.torchscript.scripting import op_counts

BEFORE = """\
AnnotatedConvBnReLUModel(
  (conv): Conv2d(3, 5, kernel_size=(3, 3), stride=(1, 1), bias=False)
  (bn): BatchNorm2d(5, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
  (relu): ReLU(inplace=True)
  (quant): QuantStub()
  (dequant): DeQuantStub()
)"""
AS_IN_RECIPE = """\
  (bn): BNReLU2d(
    (0): BatchNorm2d(5, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    (1): ReLU(inplace=True)
  )
  (relu): Identity()"""


class Run:
    def __init__(self, function, folder):
        self.folder = folder
        self.said, self.steps = [], []
        self.comparison = function(folder, say=self.said.append, progress=self.steps.append, runs=3)

    def row(self, *name):
        row = self.comparison.find(*name)
        assert row is not None, name
        return row


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return Run(recipe.example_model, tmp_path_factory.mktemp("example"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return Run(recipe.digits_net, tmp_path_factory.mktemp("digits"))


def test_the_model_is_printed_before_and_after_fusing_as_in_the_recipe(example):
    assert BEFORE in example.said[0]
    assert AS_IN_RECIPE in example.said[1]
    assert "(conv): ConvReLU2d(" in example.said[2]


def test_the_recipes_benchmark_is_run_on_its_files(example):
    for said, name in zip(
        example.said[3:], ["int8_not_fused", "int8_bn-relu_fused", "int8_fused"], strict=True
    ):
        assert said.startswith(
            f"$ speed_benchmark_torch --model={example.folder / name}.pt --input_dims=1,3,224,224 "
            "--input_type=float\nStarting benchmark.\nRunning warmup runs.\nMain runs.\n"
            "Main run finished. Microseconds per iter: "
        )


def test_every_variant_is_there(example):
    rows = [(row.variant, row.target, row.precision) for row in example.comparison.rows]
    both = ["bn-relu fused", "fused"]
    assert rows == [
        (NOT_FUSED, "eager", "fp32"),
        (NOT_FUSED, "channels_last", "fp32"),
        *((name, "eager", "fp32") for name in both),
        *((name, ".pt", "fp32") for name in (NOT_FUSED, *both)),
        *((name, ".pt", "int8") for name in (NOT_FUSED, *both)),
        *((name, ".ptl", "int8") for name in (NOT_FUSED, *both)),
        *((FOLDED, ".pte", precision) for precision in ("fp32", "fp16", "int8")),
    ]


def test_float_variants_equal_the_baseline_and_the_others_come_close(example):
    for row in example.comparison.rows:
        if row.precision == "fp32":
            assert row.difference.max_rel <= 1e-4, row
        else:
            assert {"fp16": 50, "int8": 30}[row.precision] < row.difference.sqnr_db < 80, row


def test_the_non_fused_file_is_not_fused_and_the_fused_one_is(example):
    def operators(name):
        with known_warnings_ignored():
            return op_counts(torch.jit.load(example.folder / name))

    assert operators("fp32_not_fused.pt")["aten::batch_norm"] == 1
    assert operators("fp32_fused.pt")["aten::batch_norm"] == 0
    assert operators("int8_not_fused.pt")["quantized::batch_norm2d"] == 1
    assert operators("int8_bn-relu_fused.pt")["quantized::batch_norm2d_relu"] == 1
    assert operators("int8_fused.pt")["quantized::conv2d_relu"] == 1


def test_digits_keep_their_accuracy_through_fusing_and_quantizing(digits):
    baseline = digits.comparison.baseline.accuracy.value
    assert baseline > 0.98
    for row in digits.comparison.rows:
        bound = 0.0 if row.precision == "fp32" else 0.005
        assert abs(row.accuracy.value - baseline) <= bound, row


def test_long_steps_are_announced(digits):
    assert "digits: training" in digits.steps
    assert "digits: saving int8_folded_by_lowering.pte" in digits.steps
    assert "digits: timing, round 3 of 3" in digits.steps


def test_the_result_is_json_with_every_sample(example):
    rows = json.loads(to_json(example.comparison))["rows"]
    assert all(len(row["latency"]["samples_s"]) == 3 for row in rows)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is no folder; choose another name"):
        recipe.example_model(tmp_path / "file" / "x", say=print, progress=print, runs=2)
