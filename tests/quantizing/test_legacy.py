"""Int8 for TorchScript without a stub in the model's source."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchfuse
from torchfuse.errors import InputError, QuantizationWarning, UnsupportedError
from torchfuse.quantizing import quantize
from torchfuse.quantizing.legacy import ENGINES

# Torch's own: torch.ao.quantization and torch.jit are deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:Default qconfig of oneDNN:UserWarning",  # on a CPU without VNNI
)


class Residual(nn.Module):
    """No stubs; an addition and a concatenation as operators."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.first(x)))
        z = torch.cat([self.second(y) + y, y], 1)
        return self.head(z.mean((2, 3)))


HERE = [engine for engine in ENGINES if engine in torch.backends.quantized.supported_engines]
DATA = [
    torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(20)
]


def sqnr_db(expected: Tensor, got: Tensor) -> float:
    return 10 * torch.log10(expected.square().sum() / (expected - got).square().sum()).item()


@pytest.mark.filterwarnings("ignore:.* was traced:torchfuse.ExportWarning")  # nothing branches
@pytest.mark.parametrize("engine", HERE)
@pytest.mark.parametrize("suffix", [".pt", ".ptl"])
def test_a_model_without_stubs_is_quantized_exported_and_run(
    engine: str, suffix: str, tmp_path: Path
) -> None:
    model = Residual().eval()
    result = quantize(model, DATA[0], DATA, backend=engine)
    assert [(layer.module, layer.int8) for layer in result.layers] == [
        ("first", True), ("second", True), ("head", True),
    ]  # fmt: skip
    called = [str(node.target) for node in result.model.graph.nodes]
    assert any("quantized.add" in name or "quantized::add" in name for name in called)
    artifact = torchfuse.export(result.model, DATA[0], tmp_path / f"model{suffix}")
    assert artifact.precision == "int8"
    run = torchfuse.load(artifact.path)
    expected = torch.cat([model(x) for x in DATA]).detach()
    assert sqnr_db(expected, torch.cat([run(x) for x in DATA])) > 25


def test_the_engine_and_the_model_are_as_before_afterwards() -> None:
    model, before = Residual().eval(), torch.backends.quantized.engine
    state = {name: value.clone() for name, value in model.state_dict().items()}
    quantize(model, DATA[0], DATA, backend="qnnpack")
    assert torch.backends.quantized.engine == before
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_an_engine_that_this_torch_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["x86"])
    with pytest.raises(InputError, match="This torch has no engine 'qnnpack'; it has x86"):
        quantize(Residual().eval(), DATA[0], DATA, backend="qnnpack")


def test_a_model_that_cannot_be_traced_is_an_error_that_names_the_ways_out() -> None:
    class Branching(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else -super().forward(x)

    with pytest.raises(UnsupportedError, match=r"Branching cannot be traced.*QuantStub"):
        quantize(Branching().eval(), DATA[0], DATA, backend="x86")


@pytest.mark.filterwarnings("ignore:.* was traced:torchfuse.ExportWarning")
def test_what_torch_fx_cannot_trace_is_recorded_as_it_runs(tmp_path: Path) -> None:
    class OverSizes(Residual):
        def forward(self, x: Tensor) -> Tensor:
            assert sum(int(size) for size in x.shape) > 0  # torch.fx cannot iterate over a shape
            return super().forward(x)

    model = OverSizes().eval()
    with pytest.warns(QuantizationWarning, match="recorded as it runs on the example inputs"):
        result = quantize(model, DATA[0], DATA, backend="x86")
    assert [layer.int8 for layer in result.layers] == [True, True, True]
    assert not any("batch_norm" in str(node.target) for node in result.model.graph.nodes)
    assert any("quantized.add" in str(node.target) for node in result.model.graph.nodes)
    artifact = torchfuse.export(result.model, DATA[0], tmp_path / "model.pt")
    run = torchfuse.load(artifact.path)
    expected = torch.cat([model(x) for x in DATA]).detach()
    assert sqnr_db(expected, torch.cat([run(x) for x in DATA])) > 25


def test_what_it_does_not_have_is_an_error() -> None:
    with pytest.raises(InputError, match="For 'x86' there is plain static int8 only"):
        quantize(Residual().eval(), DATA[0], DATA, backend="x86", recovery=["rounding"])
