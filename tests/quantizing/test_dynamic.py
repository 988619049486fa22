"""Linear models without calibration data: int8 and int4 weights, activations as they come."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchfuse
from torchfuse.errors import CalibrationError, InputError, QuantizationWarning, UnsupportedError
from torchfuse.quantizing import quantize


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 128)
        self.second = nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


X = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))


def sqnr_db(expected: Tensor, got: Tensor) -> float:
    return 10 * torch.log10(expected.square().sum() / (expected - got).square().sum()).item()


@pytest.mark.parametrize(("scheme", "least_db"), [("int8_dynamic", 35), ("int4", 15)])
def test_a_linear_model_is_quantized_exported_and_run(
    scheme: str, least_db: float, tmp_path: Path
) -> None:
    model = Mlp().eval()
    result = quantize(model, X, scheme=scheme)
    assert sqnr_db(model(X), result.model(X)) > least_db
    artifact = torchfuse.export(result.model, X, tmp_path / "model.pte")
    assert artifact.delegation.macs_share == 1
    assert artifact.precision == ("int4" if scheme == "int4" else "int8")
    assert sqnr_db(model(X), torchfuse.load(artifact.path)(X)) > least_db
    assert artifact.size_bytes < torchfuse.export(model, X, tmp_path / "fp32.pte").size_bytes / 2


def test_it_is_proposed_for_a_model_without_convolutions_and_without_data() -> None:
    with pytest.warns(QuantizationWarning, match="no convolutions"):
        report = quantize(Mlp().eval(), X).report
    assert report.scheme == "int8_dynamic"
    assert report.calibrated is None
    assert quantize(Mlp().eval(), X, [X]).report.scheme == "int8"


def test_a_model_with_convolutions_still_needs_calibration_data() -> None:
    with pytest.raises(CalibrationError, match="Expected calibration data, got None"):
        quantize(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.randn(1, 3, 8, 8))


def test_without_linear_layers_there_is_nothing_to_do() -> None:
    with pytest.raises(UnsupportedError, match="int4 is for linear layers, of which this model"):
        quantize(nn.Sequential(nn.ReLU()).eval(), X, scheme="int4")


def test_int4_takes_inputs_in_groups_of_32() -> None:
    with pytest.raises(UnsupportedError, match="a multiple of 32 inputs"):
        quantize(nn.Sequential(nn.Linear(33, 8)).eval(), torch.randn(1, 33), scheme="int4")


def test_recovery_is_for_static_int8() -> None:
    with pytest.raises(InputError, match="recovery is for static int8"):
        quantize(Mlp().eval(), X, scheme="int8_dynamic", recovery=["rounding"])


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int4"])
def test_given_data_it_is_measured_as_static_int8_is(scheme: str) -> None:
    data = [torch.randn(3, 64, generator=torch.Generator().manual_seed(i)) for i in range(9)]
    labels = torch.cat([Mlp().eval()(x) for x in data]).argmax(1)
    report = quantize(Mlp().eval(), X, data, scheme=scheme, explain=True, labels=labels).report
    assert report.sqnr_db > 12
    assert {error.module for error in report.layers} == {"first", "second"}
    assert [accuracy.measure for accuracy in report.accuracy] == ["top-1", "agreement"]
    assert "Measured on 9 given cases, 27 samples" in str(report)


def test_measures_without_data_are_an_error() -> None:
    with pytest.raises(InputError, match="explain is about inputs: give some as calibration"):
        quantize(Mlp().eval(), X, scheme="int8_dynamic", explain=True)


def test_what_int4_leaves_in_float_is_named() -> None:
    model = nn.Sequential(nn.Linear(33, 64), nn.Linear(64, 8)).eval()
    with pytest.warns(QuantizationWarning, match="0 stay in float: int4 takes linear layers"):
        result = quantize(model, torch.randn(1, 33), scheme="int4")
    assert [layer.int8 for layer in result.layers] == [False, True]
    assert result.report.in_float == ("0 (linear)",)


def test_a_computed_index_stays_an_integer() -> None:
    """ExecuTorch's quantizer makes the number in `positions + 1` a float tensor."""

    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(9, 64)
            self.head = nn.Linear(64, 8)

        def forward(self, positions: Tensor) -> Tensor:
            return self.head(self.table(positions + 1))

    model, positions = Embedding().eval(), torch.arange(6)
    result = quantize(model, positions, scheme="int8_dynamic")
    assert sqnr_db(model(positions), result.model(positions)) > 35
