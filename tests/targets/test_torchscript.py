"""The legacy target: fused is fused, non-fused is not, both run after loading and are right."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.ao import quantization as ao

import torchfuse
from torchfuse.cases import Case
from torchfuse.errors import ArtifactError, UnsupportedError
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.models.annotated import AnnotatedConvBnReLUModel
from torchfuse.models.batch_norms import settle_batch_norms
from torchfuse.quantizing.preprocessing import Preprocessing, WithPreprocessing
from torchfuse.targets.torchscript import scripting
from torchfuse.targets.torchscript.mobile_optimizer import folded, frozen

INPUT = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
CASE = Case((INPUT,))
FUSIONS = {
    "not fused": [],
    "the recipe's list": [["bn", "relu"]],
    "what the recipe should have fused": [["conv", "bn", "relu"]],
}


class Branching(nn.Module):
    """Everything that optimize_for_mobile looks for."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout()
        self.shortcut = nn.Conv2d(3, 8, 1)
        self.linear = nn.Linear(8, 4)
        self.linear_bn = nn.BatchNorm1d(4)

    def forward(self, x):
        y = torch.relu(self.shortcut(x) + self.dropout(self.bn(self.conv(x))))
        return self.linear_bn(self.linear(y.mean((2, 3))))


class Untypable(nn.Module):
    """Runs, and cannot be scripted."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x, *args):
        return self.conv(x, *args)


def settled(model):
    torch.manual_seed(0)
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.uniform_(norm.bias, -1.0, 1.0)
    return settle_batch_norms(model, INPUT)


def quantized(model, fusions):
    model = settled(model)
    if fusions:
        model = torchfuse.fuse_modules(model, fusions)
    return scripting.quantize(model, [CASE])


def reload(module, form):
    return scripting.deserialize(scripting.serialize(module, form), form)


@pytest.mark.parametrize("form", ["pt", "ptl"])
@pytest.mark.parametrize("made", [folded, frozen])
def test_what_is_loaded_back_computes_what_eager_computes(made, form):
    model = settled(Branching())
    scripted = scripting.script(model, CASE)
    assert scripted.traced_because is None
    loaded = reload(made(scripted.module), form)
    with torch.no_grad():
        torch.testing.assert_close(loaded(INPUT), model(INPUT), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["pt", "ptl"])
@pytest.mark.parametrize("fusions", FUSIONS.values(), ids=FUSIONS)
def test_an_int8_model_runs_after_scripting_saving_and_loading(fusions, form):
    model = quantized(AnnotatedConvBnReLUModel(), fusions)
    scripted = scripting.script(model, CASE)
    assert scripted.traced_because is None
    loaded = reload(folded(scripted.module), form)
    assert torch.equal(loaded(INPUT), model(INPUT))


@pytest.mark.parametrize(
    ("fusions", "expected"),
    [
        ([], ["quantized::conv2d", "quantized::batch_norm2d", "aten::relu_"]),
        ([["bn", "relu"]], ["quantized::conv2d", "quantized::batch_norm2d_relu"]),
        ([["conv", "bn", "relu"]], ["quantized::conv2d_relu"]),
    ],
    ids=FUSIONS,
)
def test_the_int8_operators_are_those_that_were_fused(fusions, expected):
    module = scripting.script(quantized(AnnotatedConvBnReLUModel(), fusions), CASE).module
    counts = scripting.op_counts(folded(module))
    work = [op for op in counts if op.startswith("quantized::") or "relu" in op or "norm" in op]
    assert work == expected


def test_int8_is_close_to_float_and_not_equal_to_it():
    model = settled(AnnotatedConvBnReLUModel())
    with torch.no_grad():
        expected = model(INPUT)
    fused = torchfuse.fuse_modules(model, [["conv", "bn", "relu"]])
    difference = (scripting.quantize(fused, [CASE])(INPUT) - expected).abs().max()
    assert 0 < difference / expected.abs().max() < 0.02


def test_quantizing_leaves_the_model_as_it_was():
    model = settled(AnnotatedConvBnReLUModel())
    before = copy.deepcopy(model.state_dict())
    scripting.quantize(model, [CASE])
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    assert not hasattr(model, "qconfig")
    assert [type(module) for module in model.children()][:2] == [nn.Conv2d, nn.BatchNorm2d]


def test_scripting_leaves_a_converted_model_as_it_was():
    model = settled(AnnotatedConvBnReLUModel())
    model.qconfig = ao.get_default_qconfig("qnnpack")
    with known_warnings_ignored():
        prepared = ao.prepare(model)
        prepared(INPUT)
        converted = ao.convert(prepared)
        scripting.script(converted, CASE)
    assert converted.bn.scale.shape == (1,)


def test_a_model_that_cannot_be_scripted_is_traced_and_says_so():
    model = Untypable().eval()
    scripted = scripting.script(model, CASE)
    assert "variable number of arguments" in scripted.traced_because
    torch.testing.assert_close(scripted.module(INPUT), model(INPUT))


def test_a_reason_ends_before_the_place_in_the_code_that_follows_it():
    class Annotated(nn.Module):
        def __init__(self):
            super().__init__()
            self.__class__.__annotations__ = {"scale": "Tensor"}  # as text, from __future__
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x):
            return x * self.scale

    scripted = scripting.script(Annotated().eval(), CASE)
    assert scripted.traced_because == "Unknown type annotation: 'Tensor'"


def test_a_model_behind_its_preprocessing_is_scripted():
    model = WithPreprocessing(nn.Conv2d(3, 4, 1).eval(), Preprocessing((8, 8)))
    pixels = torch.randint(0, 256, (1, 8, 8, 3), dtype=torch.uint8)
    scripted = scripting.script(model, Case((pixels,)))
    assert scripted.traced_because is None
    torch.testing.assert_close(scripted.module(pixels), model(pixels))


def test_keyword_inputs_are_traced_by_position():
    class TwoInputs(Untypable):
        def forward(self, x, scale, *args):
            return self.conv(x, *args) * scale

    model = TwoInputs().eval()
    case = Case((INPUT,), {"scale": torch.tensor(2.0)})
    module = scripting.script(model, case).module
    torch.testing.assert_close(module(INPUT, case.kwargs["scale"]), model(INPUT, 2.0))


def test_an_int8_model_without_stubs_is_an_error_that_says_what_is_missing():
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(UnsupportedError, match=r"there is no QuantStub; add them, or use '\.pte'"):
        scripting.quantize(model, [CASE])


def test_int8_outside_of_the_stubs_is_an_error_that_says_so():
    model = settled(nn.Sequential(ao.QuantStub(), nn.Conv2d(3, 4, 3), ao.DeQuantStub()))
    model[0], model[1] = model[1], model[0]
    with pytest.raises(UnsupportedError, match="must lie between a QuantStub and a DeQuantStub"):
        scripting.quantize(model, [CASE])


def test_an_engine_that_this_build_does_not_have_is_an_error_that_lists_those_it_has():
    with pytest.raises(UnsupportedError, match=r"no quantized engine 'cuda'; it has .*qnnpack"):
        scripting.quantize(settled(AnnotatedConvBnReLUModel()), [CASE], engine="cuda")


@pytest.mark.parametrize("form", ["pt", "ptl"])
def test_bytes_that_are_no_archive_are_an_error(form):
    with pytest.raises(ArtifactError, match=f"cannot load it as '.{form}'"):
        scripting.deserialize(b"PK\x03\x04 and nothing more", form)


def test_the_engine_is_put_back():
    before = torch.backends.quantized.engine
    quantized(AnnotatedConvBnReLUModel(), [])
    assert torch.backends.quantized.engine == before


def test_loading_an_int8_file_says_nothing(tmp_path):
    path = tmp_path / "int8.pt"
    model = quantized(AnnotatedConvBnReLUModel(), [])
    path.write_bytes(scripting.serialize(scripting.script(model, CASE).module, "pt"))
    code = (
        "import sys; from torchfuse.targets.torchscript.scripting import deserialize; "
        "deserialize(open(sys.argv[1], 'rb').read(), 'pt')"
    )
    command = [sys.executable, "-c", code, path]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == run.stderr == ""
