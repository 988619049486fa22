"""Where int8 was asked for and most of the model, or all of it, stayed in float, that is said."""

import json

import pytest
import torch
from torch import nn

import torchfuse
from torchfuse.errors import QuantizationWarning, UnsupportedError
from torchfuse.quantizing import QuantizedLayer
from torchfuse.quantizing.unquantized import mostly_float, quantized_share

LEFT = (
    r"Only 2% of the layers' weights are quantized; computed in float: rnn \(lstm\), since int8 "
    "for XNNPACK takes no lstm; expect little gain in size and speed"
)


class Recurrent(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 24, batch_first=True)
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.rnn(x)[0])
        return y


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 3, 8) for _ in range(4)]


def test_an_lstm_that_stays_in_float_is_warned_of_and_in_the_report(inputs):
    model = Recurrent(nn.Linear(24, 3)).eval()
    with pytest.warns(QuantizationWarning, match=LEFT):
        found = torchfuse.quantize(model, inputs[0], inputs)
    assert found.report.in_float == ("rnn (lstm)",)
    assert found.report.quantized_share == pytest.approx(72 / (72 + 96 * 8 + 96 * 24))
    assert json.loads(found.report.to_json())["quantized_share"] == found.report.quantized_share
    assert "Computed in float: rnn (lstm)" in str(found.report)


@pytest.mark.filterwarnings("ignore::torchfuse.DelegationWarning")
def test_the_file_of_an_lstm_says_how_little_of_it_is_in_int8(inputs, tmp_path):
    model = Recurrent(nn.Linear(24, 3)).eval()
    with pytest.warns(QuantizationWarning, match=LEFT):
        artifact = torchfuse.export(
            model, inputs[0], tmp_path / "rnn.pte", precision="int8", calibration=inputs
        )
    assert artifact.notes == (
        "quantized in part: 2% of the layers' weights are quantized; computed in float: "
        "rnn (lstm), since int8 takes no lstm",
    )


def test_a_model_in_which_nothing_can_be_quantized_is_an_error(inputs):
    model = Recurrent(nn.Identity()).eval()
    with pytest.raises(
        UnsupportedError,
        match=r"Nothing in this model was quantized: computed in float: rnn \(lstm\), since int8 "
        "for XNNPACK takes no lstm; export it with precision='fp16', or as it is",
    ):
        torchfuse.quantize(model, inputs[0], inputs)


def test_a_model_without_any_layer_is_an_error(inputs):
    with pytest.raises(UnsupportedError, match="it has no layer that int8 for XNNPACK takes"):
        torchfuse.quantize(nn.Softmax(-1).eval(), inputs[0], inputs)


def test_an_engine_of_torch_leaves_an_lstm_in_float_too_and_says_so(inputs):
    model = Recurrent(nn.Linear(24, 3)).eval()
    with pytest.warns(QuantizationWarning, match=LEFT.replace("XNNPACK", "qnnpack")):
        torchfuse.quantize(model, inputs[0], inputs, backend="qnnpack")


def test_a_model_in_int8_needs_no_words(inputs):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    report = torchfuse.quantize(model, inputs[0], inputs).report
    assert (report.quantized_share, report.in_float, report.notes) == (1.0, (), ())


def test_layers_that_stay_in_float_on_request_are_not_called_unsupported():
    layers = [QuantizedLayer("fc", "linear", False, 9), QuantizedLayer("conv", "conv2d", True, 1)]
    assert quantized_share(layers) == 0.1
    assert mostly_float(layers) == (
        "10% of the layers' weights are quantized; computed in float: fc (linear)"
    )
    assert mostly_float([QuantizedLayer("", "matmul", False)]) is None  # nothing to shrink


@pytest.mark.filterwarnings("ignore:0 stay in float:torchfuse.QuantizationWarning")
def test_weights_in_int4_are_counted_too():
    model = nn.Sequential(nn.Linear(33, 64), nn.Linear(64, 32)).eval()
    report = torchfuse.quantize(model, torch.randn(1, 33), scheme="int4").report
    assert report.quantized_share == pytest.approx(64 * 32 / (64 * 32 + 33 * 64))
