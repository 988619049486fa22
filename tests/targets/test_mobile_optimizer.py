"""optimize_for_mobile: torch's own, as far as a build without XNNPACK goes, and the recipe's int8.

What torch's own tests (test/test_mobile_optimizer.py of PyTorch) ask for is asked for here too,
but for XNNPACK's prepacked operators.
"""

import copy
import re
import warnings

import pytest
import torch
import torch.utils.bundled_inputs
from torch import nn
from torch.ao import quantization as ao
from torch.nn import functional as F
from torch.utils.mobile_optimizer import MobileOptimizerType

import torchfuse
from torchfuse.cases import Case
from torchfuse.errors import ExportWarning, InputError, QuantizationWarning, UnsupportedError
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.models.annotated import AnnotatedConvBnReLUModel
from torchfuse.models.batch_norms import settle_batch_norms
from torchfuse.targets.torchscript import mobile_optimizer, scripting
from torchfuse.targets.torchscript.mobile_optimizer import folded, frozen
from torchfuse.targets.torchscript.scripting import op_counts

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor.*deprecated"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),  # torch's bundled_inputs
    pytest.mark.filterwarnings("ignore:must run observer before calling:UserWarning"),
]

INPUT = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Branching(nn.Module):
    """Everything that optimize_for_mobile looks for, in two methods."""

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

    @torch.jit.export
    def features(self, x):
        return F.relu(self.shortcut(x) + self.dropout(self.bn(self.conv(x))))


class OnlyFeatures(nn.Module):
    """A module without a forward."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 12)

    @torch.jit.export
    def features(self, x):
        return F.relu(self.linear(x) + x)


class Auxiliary(nn.Module):
    """A batch norm of its own for training."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.main, self.second, self.auxiliary = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x):
        y = self.conv(x)
        if self.training:
            return self.auxiliary(y)
        return self.second(torch.relu(self.main(y)))


def assert_close(a, b):
    """Within 1e-5 of the largest value, as fusions are judged: CPUs differ in how sums round."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


def settled(model):
    torch.manual_seed(0)
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.uniform_(norm.bias, -1.0, 1.0)
    return settle_batch_norms(model, INPUT)


@pytest.fixture
def branching():
    return torch.jit.script(settled(Branching()))


def converted(fusions=(), *, data=(), model=AnnotatedConvBnReLUModel):
    """A model by the recipe: prepare, run on `data`, convert."""
    model = settled(model())
    if fusions:
        model = torchfuse.fuse_modules(model, fusions)
    model.qconfig = ao.get_default_qconfig("qnnpack")
    ao.prepare(model, inplace=True)
    with torch.no_grad():
        for x in data:
            model(x)
    return ao.convert(model, inplace=True)


# What it does.


def test_it_folds_batch_norms_and_fuses_add_with_relu_and_drops_dropout(branching):
    counts = op_counts(torchfuse.optimize_for_mobile(branching))
    assert counts["aten::conv2d"] + counts["aten::linear"] == 3
    assert counts["aten::_add_relu"] == 1
    for gone in ("aten::batch_norm", "aten::dropout", "aten::add", "aten::relu"):
        assert counts[gone] == 0


def test_the_result_computes_the_same_and_says_that_it_was_optimized(branching):
    optimized = torchfuse.optimize_for_mobile(branching)
    assert_close(optimized(INPUT), branching(INPUT))
    assert optimized.mobile_optimized


def test_the_module_given_is_unchanged_and_keeps_its_mode():
    scripted = torch.jit.script(settled(Branching()).train())
    scripted.dropout.eval()
    before = copy.deepcopy(scripted.state_dict())
    optimized = torchfuse.optimize_for_mobile(scripted)
    assert (scripted.training, scripted.bn.training, scripted.dropout.training) == (
        True,
        True,
        False,
    )
    assert all(torch.equal(scripted.state_dict()[key], before[key]) for key in before)
    assert_close(optimized(INPUT), scripted.eval()(INPUT))


def test_a_traced_module_is_taken():
    model = settled(Branching())
    optimized = torchfuse.optimize_for_mobile(torch.jit.trace(model, INPUT))
    assert_close(optimized(INPUT), model(INPUT))


def test_what_was_optimized_is_taken_again(branching):
    again = torchfuse.optimize_for_mobile(torchfuse.optimize_for_mobile(branching))
    assert_close(again(INPUT), branching(INPUT))


def test_preserved_methods_are_kept_and_optimized_and_others_are_not_kept(branching):
    assert not hasattr(torchfuse.optimize_for_mobile(branching), "features")
    optimized = torchfuse.optimize_for_mobile(branching, preserved_methods=["features"])
    assert_close(optimized.features(INPUT), branching.features(INPUT))
    kinds = {node.kind() for node in mobile_optimizer.nodes(optimized.features.graph)}
    assert "aten::_add_relu" in kinds
    assert not kinds & {"aten::batch_norm", "aten::dropout"}


def test_a_module_without_forward_is_optimized_where_methods_are_named():
    scripted = torch.jit.script(OnlyFeatures())
    optimized = torchfuse.optimize_for_mobile(scripted, preserved_methods=["features"])
    assert_close(optimized.features(INPUT), scripted.features(INPUT))


@pytest.mark.parametrize(
    ("blocked", "left"),
    [
        ("CONV_BN_FUSION", {"aten::batch_norm", "aten::_add_relu"}),
        ("REMOVE_DROPOUT", {"aten::dropout", "aten::_add_relu"}),
        ("FUSE_ADD_RELU", {"aten::add", "aten::relu"}),
        ("INSERT_FOLD_PREPACK_OPS", {"aten::_add_relu"}),
        ("HOIST_CONV_PACKED_PARAMS", {"aten::_add_relu"}),
    ],
)
def test_what_is_blocked_is_not_done_and_the_rest_is(branching, blocked, left):
    optimized = torchfuse.optimize_for_mobile(branching, {getattr(MobileOptimizerType, blocked)})
    looked_for = {*("aten::batch_norm", "aten::dropout"), *("aten::add", "aten::relu")}
    assert set(op_counts(optimized)) & {*looked_for, "aten::_add_relu"} == left
    assert_close(optimized(INPUT), branching(INPUT))


def test_bundled_inputs_are_kept():
    class OfItsOwn(Branching):
        """They become methods of the class in TorchScript, for all modules of that class."""

    branching = torch.jit.script(settled(OfItsOwn()))
    inputs = [(torch.ones(1, 3, 12, 12),)]
    torch.utils.bundled_inputs.augment_model_with_bundled_inputs(branching, inputs, [])
    optimized = torchfuse.optimize_for_mobile(branching)
    assert optimized.get_num_bundled_inputs() == 1
    assert torch.equal(optimized.get_all_bundled_inputs()[0][0], inputs[0][0])


@pytest.mark.parametrize("form", ["pt", "ptl"])
def test_it_is_saved_as_torch_saves_and_loaded_as_torch_loads(branching, tmp_path, form):
    optimized = torchfuse.optimize_for_mobile(branching)
    path = str(tmp_path / f"model.{form}")
    with known_warnings_ignored():
        if form == "pt":
            torch.jit.save(optimized, path)
            loaded = torch.jit.load(path)
        else:
            optimized._save_for_lite_interpreter(path)
            loaded = torch.jit.mobile._load_for_lite_interpreter(path)
    assert_close(loaded(INPUT), branching(INPUT))
    assert_close(torchfuse.load(path)(INPUT), branching(INPUT))


def test_a_build_with_xnnpack_uses_torchs_own(branching, monkeypatch):
    given = []
    monkeypatch.setattr(torch.backends.xnnpack.__class__, "enabled", True)
    monkeypatch.setattr(
        mobile_optimizer.mobile_optimizer,
        "optimize_for_mobile",
        lambda *arguments: given.append(arguments) or frozen(branching),
    )
    blocked = {MobileOptimizerType.CONV_BN_FUSION}
    torchfuse.optimize_for_mobile(branching, blocked, ["features"])
    assert given == [(branching, blocked, ["features"])]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            lambda scripted: (Branching(),),
            InputError,
            r"Expected a ScriptModule, got Branching; .* with torch\.jit\.script\(model\)",
        ),
        (
            lambda scripted: (scripted, {"CONV_BN_FUSION"}),
            InputError,
            r"MobileOptimizerType as optimization_blocklist, got 'CONV_BN_FUSION' in it",
        ),
        (
            lambda scripted: (scripted, None, ["predict"]),
            InputError,
            "has no method 'predict' to preserve; it has forward, features",
        ),
        (
            lambda scripted: (torch.jit.script(OnlyFeatures()),),
            InputError,
            "has no forward; name the methods to keep with preserved_methods",
        ),
        (
            lambda scripted: (scripted, None, None, "Vulkan"),
            UnsupportedError,
            r"for backend='CPU', not for 'Vulkan', which torch\.utils\.mobile_optimizer does in a",
        ),
        (lambda scripted: (scripted, None, None, "metal"), UnsupportedError, "not for 'metal'"),
        (lambda scripted: (scripted, None, None, "npu"), InputError, "'CPU', got 'npu'"),
    ],
)
def test_what_cannot_be_done_is_an_error_that_says_so(branching, arguments, error, message):
    with pytest.raises(error, match=message):
        torchfuse.optimize_for_mobile(*arguments(branching))


# What is frozen only.


def test_the_non_fused_artifact_is_really_not_fused(branching):
    counts = op_counts(frozen(branching))
    assert counts["aten::batch_norm"] == 2
    assert counts["aten::add"] == 1
    assert counts["aten::relu"] == 1
    assert counts["aten::_add_relu"] == 0


def test_a_branch_for_training_is_no_fold():
    assert op_counts(frozen(torch.jit.script(settled(Auxiliary()))))["aten::batch_norm"] == 2


# int8.


FUSIONS = {"not fused": [], "bn-relu": [["bn", "relu"]], "all": [["conv", "bn", "relu"]]}


@pytest.mark.parametrize("fusions", FUSIONS.values(), ids=FUSIONS)
def test_a_model_converted_by_hand_runs_as_in_eager_mode(fusions):
    model = converted(fusions, data=[INPUT])
    optimized = torchfuse.optimize_for_mobile(torch.jit.script(model))
    assert torch.equal(optimized(INPUT), model(INPUT))


@pytest.mark.parametrize("fusions", FUSIONS.values(), ids=FUSIONS)
def test_a_model_converted_without_data_runs_and_the_warning_says_how_to_calibrate(fusions):
    model = converted(fusions)
    with pytest.warns(
        QuantizationWarning,
        match=r"converted without data: (\d) of \1 int8 operators \(quantize_per_tensor, conv2d.*"
        r"scale of 1 and a zero point of 0, .* call model\.eval\(\) and run the model on",
    ) as told:
        optimized = torchfuse.optimize_for_mobile(torch.jit.script(model))
    (warning,) = (w for w in told if w.category is QuantizationWarning)
    assert warning.filename == __file__
    assert torch.equal(optimized(INPUT), model(INPUT))


def test_a_part_that_no_data_reached_is_told_by_its_operator():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant, self.dequant = ao.QuantStub(), ao.DeQuantStub()
            self.conv, self.other = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            q = self.quant(x)
            return self.dequant(self.conv(q) if x.shape[0] > 1 else self.other(q))

    scripted = torch.jit.script(converted(data=[INPUT], model=TwoHeads))
    with pytest.warns(QuantizationWarning, match=r"1 of 3 int8 operators \(conv2d\) have"):
        torchfuse.optimize_for_mobile(scripted)


def test_pixels_from_0_to_255_are_no_missing_data():
    """Their scale is exactly 1, and their zero point 0."""
    pixels = torch.arange(256.0).repeat(3).reshape(1, 3, 16, 16)
    model = settled(AnnotatedConvBnReLUModel())
    model.qconfig = ao.QConfig(
        activation=ao.MinMaxObserver.with_args(dtype=torch.quint8),
        weight=ao.default_weight_observer,
    )
    ao.prepare(model, inplace=True)
    model(pixels)
    scripted = torch.jit.script(ao.convert(model))
    assert (float(scripted.quant.scale), int(scripted.quant.zero_point)) == (1.0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantizationWarning)
        torchfuse.optimize_for_mobile(scripted)


@pytest.mark.parametrize("optimize", [True, False])
def test_export_tells_of_missing_data_too(tmp_path, optimize):
    with pytest.warns(ExportWarning, match=r"'m\.pt' was converted without data: 3 of 3 int8"):
        torchfuse.export(converted(), INPUT, tmp_path / "m.pt", optimize=optimize)


def test_packed_parameters_are_constants_of_the_graph():
    model = converted([["conv", "bn", "relu"]], data=[INPUT])
    optimized = torchfuse.optimize_for_mobile(torch.jit.script(model))
    assert op_counts(optimized)["prim::GetAttr"] == 0
    packed = r"Conv2dPackedParamsBase = prim::Constant"
    assert len(re.findall(packed, str(optimized.graph))) == 1


def test_int8_models_of_the_target_are_optimized_without_a_word():
    model = scripting.quantize(settled(AnnotatedConvBnReLUModel()), [Case((INPUT,))])
    assert mobile_optimizer.without_data(folded(torch.jit.script(model))) is None
