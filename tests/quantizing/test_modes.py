"""Which training flags count, when a model is quantized or exported."""

import functools
import warnings

import pytest
import torch
from torch import fx, nn
from torch.ao import quantization as ao
from torch.ao.nn import quantized as nnq
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import torchfuse
from torchfuse.errors import InputError, UnsupportedError
from torchfuse.models.annotated import AnnotatedConvBnReLUModel
from torchfuse.models.batch_norms import settle_batch_norms
from torchfuse.quantizing.modes import has_modes
from torchfuse.quantizing.preconditions import require_eval_mode

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor.*deprecated"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning"),
    pytest.mark.filterwarnings("ignore:_aminmax is deprecated:UserWarning"),
]

INPUT = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
WHOLE = [["conv", "bn", "relu"]]


def converted(fusions=()):
    model = settle_batch_norms(AnnotatedConvBnReLUModel(), INPUT)
    if fusions:
        model = torchfuse.fuse_modules(model, fusions)
    model.qconfig = ao.get_default_qconfig("qnnpack")
    ao.prepare(model, inplace=True)(INPUT)
    return ao.convert(model, inplace=True)


def converted_after_training():
    model = torchfuse.fuse_modules_qat(AnnotatedConvBnReLUModel().train(), WHOLE)
    model.qconfig = ao.get_default_qat_qconfig("qnnpack")
    ao.prepare_qat(model, inplace=True)(INPUT)
    return ao.convert(model.eval(), inplace=True)


@pytest.fixture
def qnnpack():
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "qnnpack"  # which runs the file: the same to the last bit
    yield
    torch.backends.quantized.engine = before


@pytest.mark.usefixtures("qnnpack")
@pytest.mark.parametrize("form", ["pt", "ptl"])
@pytest.mark.parametrize(
    "made", [converted, functools.partial(converted, WHOLE), converted_after_training]
)
def test_a_model_converted_by_hand_is_exported_without_another_eval(made, form, tmp_path):
    model = made()
    assert any(module.training for module in model.modules())
    artifact = torchfuse.export(model, INPUT, tmp_path / f"model.{form}")
    assert artifact.precision == "int8"
    assert torch.equal(torchfuse.load(artifact.path)(INPUT), model(INPUT))


def test_a_model_converted_in_training_mode_is_refused(tmp_path):
    with pytest.raises(InputError, match="but the model itself is in training mode; call model"):
        torchfuse.export(converted().train(), INPUT, tmp_path / "model.pt")


@pytest.mark.parametrize(
    "made",
    [
        lambda model: ao.prepare(model),
        lambda model: ao.prepare_qat(model.train()).eval(),
    ],
)
def test_a_model_that_was_prepared_only_is_refused(made, tmp_path):
    model = AnnotatedConvBnReLUModel().eval()
    model.qconfig = ao.get_default_qat_qconfig("qnnpack")
    with pytest.raises(InputError, match=r"is an observer \(FusedMovingAvg.*convert the model on"):
        torchfuse.export(made(model), INPUT, tmp_path / "model.pt")


def test_a_model_prepared_by_torchfuse_only_is_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    prepared = torchfuse.prepare_qat(model, INPUT).eval()
    with pytest.raises(InputError, match=r"which prepare put there; .* torchfuse\.convert_qat"):
        torchfuse.export(prepared, INPUT, tmp_path / "model.pte")


def test_a_converted_model_is_not_for_executorch(tmp_path):
    with pytest.raises(UnsupportedError, match=r"that torch\.ao converted is for '\.pt' and"):
        torchfuse.export(converted(), INPUT, tmp_path / "model.pte")


# What a module's own flag changes.


class Reads(nn.Module):
    def forward(self, x):
        return F.dropout(x, training=self.training)


class Asks(nn.Module):
    def forward(self, x):
        return x if getattr(self, "training") else -x  # noqa: B009  # as some do


class ReadsInAMethod(nn.Module):
    def forward(self, x):
        return self.inner(x)

    def inner(self, x):
        return (lambda y: y if self.training else -y)(x)


class ReadsInAProperty(nn.Module):
    @property
    def rate(self):
        return 0.5 if self.training else 0.0

    def forward(self, x):
        return x * self.rate


class ReadsAbove(Reads):
    def forward(self, x):
        return super().forward(x) + 1


class ReadsAboveByName(Reads):
    def forward(self, x):
        return Reads.forward(self, x) + 1


class ReadsWrapped(nn.Module):
    @torch.no_grad()
    def forward(self, x):
        return x if self.training else -x


def scale_of(module):
    return 2.0 if module.training else 1.0


class ReadsInAFunction(nn.Module):
    def forward(self, x):
        return x * scale_of(self)


class Overrides(Reads):
    """Only what it overrides reads the flag."""

    def forward(self, x):
        return x


class Sets(nn.Module):
    """No computation depends on it."""

    def __init__(self):
        super().__init__()
        self.training = True

    def forward(self, x):
        return x

    def extra_repr(self):
        return f"training={self.training}"


def with_hook():
    module = nn.Conv2d(3, 4, 1)
    module.register_forward_hook(lambda module, args, output: None)
    return module


def with_a_forward_of_its_own():
    module = nn.Identity()
    module.forward = functools.partial(F.dropout, p=0.5)
    return module


def with_spectral_norm():
    return parametrizations.spectral_norm(nn.Linear(3, 3)).parametrizations.weight[0]


MODES = [
    *(Reads, Asks, ReadsInAMethod, ReadsInAProperty, ReadsAbove, ReadsAboveByName, ReadsWrapped),
    *(ReadsInAFunction, with_hook, with_a_forward_of_its_own, with_spectral_norm),
    *(nn.Dropout, lambda: nn.BatchNorm2d(3), lambda: nn.LSTM(3, 3), lambda: nn.RReLU()),
    *(lambda: nn.TransformerEncoderLayer(4, 2), lambda: torch.jit.script(nn.Dropout())),
]
NO_MODES = [
    *(Overrides, Sets, nn.Identity, nn.ReLU, nn.Sequential, nnq.Quantize, nnq.Linear),
    *(lambda: nn.Conv2d(3, 3, 1), lambda: nnq.Conv2d(3, 3, 1), lambda: nnq.BatchNorm2d(3)),
]


@pytest.mark.parametrize("made", MODES)
def test_a_part_whose_flag_changes_what_it_computes_has_modes(made):
    module = made()
    assert has_modes(module)
    with pytest.raises(InputError, match=r"but 1 is in training mode; call model\.eval\(\)"):
        require_eval_mode(in_eval_mode_but_for(module))


@pytest.mark.parametrize("made", NO_MODES)
def test_a_part_whose_flag_changes_nothing_has_none(made):
    arguments = {nnq.Quantize: (1.0, 0, torch.quint8), nnq.Linear: (3, 3)}
    module = made(*arguments.get(made, ()))
    assert not has_modes(module)
    require_eval_mode(in_eval_mode_but_for(module))


def in_eval_mode_but_for(module):
    model = nn.Sequential(nn.ReLU(), module).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.training = True
    return model


def test_the_models_own_flag_counts_whatever_it_is_made_of():
    with pytest.raises(InputError, match="the model itself is in training mode"):
        require_eval_mode(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))


def test_a_traced_graph_has_the_modes_of_what_it_calls():
    traced = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout()))
    with pytest.raises(InputError, match="but 1 is in training mode"):
        require_eval_mode(traced)
    traced.get_submodule("1").eval()
    require_eval_mode(traced)
