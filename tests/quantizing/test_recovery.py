"""What recovery wins back is measured, and what it may not change stays."""

import copy

import pytest
import torch
from torch import Tensor, nn

from torchfuse.cases import Case, cases
from torchfuse.errors import InputError, QuantizationWarning
from torchfuse.quantizing import quantize, static
from torchfuse.quantizing.equalization import equalize
from torchfuse.quantizing.layerwise import attribute, set_attribute
from torchfuse.quantizing.quantization_report import MaxDrop
from torchfuse.quantizing.recovery import STEPS, _held_out
from torchfuse.quantizing.rounding import _rounded, correct


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Depthwise(nn.Module):
    """Expand, depthwise, project; the channels in the middle are as unbalanced as `factors`."""

    def __init__(self, factors: Tensor, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        torch.manual_seed(0)
        channels = len(factors)
        self.expand = nn.Conv2d(3, channels, 1)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.project = nn.Conv2d(channels, 4, 1)
        self.activation = activation()
        with torch.no_grad():
            self.expand.weight.mul_(factors.reshape(-1, 1, 1, 1))
            self.expand.bias.mul_(factors)
            self.depthwise.weight.div_(factors.reshape(-1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.expand(x))
        return self.project(self.activation(self.depthwise(x))).mean((2, 3))


UNBALANCED = 10.0 ** torch.linspace(-4, 0, 16)
DATA = [noise(1, 3, 8, 8, seed=seed) for seed in range(40)]
CASES = [Case((x,)) for x in DATA]


def graph_of(model: nn.Module) -> torch.fx.GraphModule:
    return static.float_graph(model.eval(), cases(DATA[0])[0], CASES, None)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x in DATA])


def sqnr_db(expected: Tensor, got: Tensor) -> float:
    return 10 * torch.log10(expected.square().sum() / (expected - got).square().sum()).item()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Identity])
def test_equalising_changes_nothing_in_float(activation: type[nn.Module]) -> None:
    model = Depthwise(UNBALANCED, activation).eval()
    graph = graph_of(model)
    assert equalize(graph, CASES) == 2
    assert sqnr_db(outputs(model), outputs(graph)) > 110


def test_equalising_balances_the_channels_of_a_depthwise_layers_input() -> None:
    graph = graph_of(Depthwise(UNBALANCED))
    equalize(graph, CASES)
    (weight,) = [
        attribute(graph, node.args[1].target) for node in graph.graph.nodes if node.name == "conv2d"
    ]
    rows = weight.flatten(1).abs().amax(1)
    assert rows.max() / rows.min() < 30  # 10 000 before


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0, 4)


@pytest.mark.parametrize("clamp", [nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, Clamp])
def test_channels_under_a_clamp_are_skipped(clamp: type[nn.Module]) -> None:
    """Scaled by s, a channel would end at 1/s of the clamp's bound, on inputs larger than these."""
    model = Depthwise(UNBALANCED, clamp).eval()
    graph = graph_of(model)
    assert equalize(graph, CASES) == 0
    larger = 100 * noise(1, 3, 8, 8, seed=99)
    with torch.no_grad():
        torch.testing.assert_close(graph(larger), model(larger))


def test_a_tensor_that_the_model_also_returns_is_skipped() -> None:
    class Returning(Depthwise):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.activation(self.expand(x))
            return self.project(self.depthwise(y)), y

    graph = graph_of(Returning(UNBALANCED))
    before = attribute(graph, "expand.weight").clone()
    equalize(graph, CASES)
    assert torch.equal(attribute(graph, "expand.weight"), before)


def test_layers_that_share_a_weight_are_skipped() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(3, 3)
            self.b = nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    model = Tied().eval()
    given = [Case((noise(4, 3, seed=seed),)) for seed in range(3)]
    graph = static.float_graph(model, given[0], given, None)
    assert equalize(graph, given) == 0


def test_unbalanced_depthwise_channels_collapse_by_default_and_do_not_with_equalisation() -> None:
    model = Depthwise(UNBALANCED).eval()
    expected = outputs(model)
    plain = quantize(model, DATA[0], DATA)
    ours = quantize(model, DATA[0], DATA, recovery=["equalization"])
    # Without what is the same for all inputs, most of which is the biases.
    centre = expected.mean(0)
    assert sqnr_db(expected - centre, outputs(plain.model) - centre) < 5
    assert sqnr_db(expected - centre, outputs(ours.model) - centre) > 15
    careful, step = ours.report.recovery
    assert careful.name == "careful_ranges"
    assert step.kept
    assert step.sqnr_db_after > step.sqnr_db_before + 10


def test_a_planted_shift_of_the_biases_is_taken_back() -> None:
    model = Depthwise(torch.ones(16)).eval()
    graph = graph_of(model)
    int8 = quantize(model, DATA[0], DATA).model
    right = sqnr_db(outputs(model), outputs(int8))
    for node in int8.graph.nodes:
        if node.name.startswith("conv2d") and node.target is torch.ops.aten.conv2d.default:
            bias = node.args[2].target
            set_attribute(int8, bias, attribute(int8, bias) + 0.05)
    assert sqnr_db(outputs(model), outputs(int8)) < right - 10
    assert correct(int8, graph, CASES, rounding=False) == 3
    assert sqnr_db(outputs(model), outputs(int8)) > right - 1


@pytest.mark.parametrize(
    "layers",
    [
        nn.Sequential(nn.Conv1d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv1d(8, 4, 1)),
        nn.Sequential(nn.Conv2d(3, 8, 3, dilation=2, groups=1), nn.ReLU(), nn.Conv2d(8, 4, 2)),
        nn.Sequential(nn.Linear(9, 32), nn.ReLU(), nn.Linear(32, 4)),
    ],
)
def test_rounding_corrects_every_layer_of_these_kinds(layers: nn.Module) -> None:
    torch.manual_seed(1)
    shape = {nn.Conv1d: (1, 3, 16), nn.Conv2d: (1, 3, 9, 9), nn.Linear: (6, 9)}[type(layers[0])]
    given = [noise(*shape, seed=seed) for seed in range(24)]
    result = quantize(layers.eval(), given[0], given, recovery=["rounding"])
    _, step = result.report.recovery
    assert step.note == "2 layers"
    assert step.sqnr_db_after > step.sqnr_db_before - 1
    assert result.report.sqnr_db is not None
    assert result.report.sqnr_db > max(step.sqnr_db_after, step.sqnr_db_before) - 1e-3


@pytest.mark.parametrize("step", ["bias_correction", "rounding"])
def test_a_layer_whose_inputs_never_change_is_corrected(step: str) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    layers[0].bias.data += 100
    given = [noise(1, 3, 9, 9, seed=seed) for seed in range(40)]
    result = quantize(layers.eval(), given[0], given, recovery=[step])
    assert result.report.recovery[-1].note == "3 layers"


def test_weights_are_rounded_so_that_the_layers_output_stays() -> None:
    weight, inputs = noise(8, 24).double(), noise(24, 200, seed=1).double()
    inputs[1:] += 2 * inputs[:1]  # inputs that go together, as channels do
    covariance = inputs @ inputs.T / inputs.shape[1]
    scale = weight.abs().amax(1, keepdim=True) / 7  # coarse, so that rounding matters
    nearest = (weight / scale).round()
    ours = _rounded(weight, covariance, scale)
    assert torch.equal(ours, ours.round())
    assert ours.abs().max() <= 127

    def lost(rounded: Tensor) -> float:
        return ((weight - scale * rounded) @ inputs).square().sum().item()

    assert lost(ours) < 0.7 * lost(nearest)


def test_a_step_that_does_not_help_is_undone_and_said_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()  # nothing to equalise
    result = quantize(model, DATA[0], DATA, recovery=["equalization"])
    _, step = result.report.recovery
    assert not step.kept
    assert step.sqnr_db_after == step.sqnr_db_before


def test_careful_ranges_that_gain_nothing_are_undone_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3)).eval()
    few = DATA[:24]
    result = quantize(model, few[0], few, recovery=["careful_ranges"])
    (step,) = result.report.recovery
    assert step.sqnr_db_after <= step.sqnr_db_before
    assert not step.kept
    plain = quantize(model, few[0], few).model
    assert torch.equal(result.model(few[0]), plain(few[0]))


def test_steps_are_judged_on_data_that_they_were_not_fitted_to() -> None:
    torch.manual_seed(0)
    widths = [nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8)]
    model = nn.Sequential(*widths).eval()
    given = [noise(1, 256, seed=seed) for seed in range(40)]
    enough = quantize(model, given[0], given, recovery=["rounding"]).report
    few = quantize(model, given[0], given[:24], recovery=["rounding"]).report
    # Of 256 columns on 24 samples, rounding fits the samples.
    assert [step.kept for step in few.recovery] == [True, True]
    assert [step.kept for step in enough.recovery] == [True, False]
    assert "Recovery was judged on 8 of the 40 samples, which its steps were not" in enough.notes[0]
    assert not few.notes


def test_what_is_held_out_is_a_quarter_in_stretches() -> None:
    fitted, judged = _held_out(list(range(64)))
    assert judged == [*range(12, 16), *range(28, 32), *range(44, 48), *range(60, 64)]
    assert sorted([*fitted, *judged]) == list(range(64))
    assert _held_out(list(range(31))) == (list(range(31)), list(range(31)))


def test_careful_ranges_stay_if_what_builds_on_them_gains_more_than_they_lose() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3)]
    few = [x.sign() * x.square() for x in DATA[:24]]  # with outliers
    report = quantize(nn.Sequential(*layers).eval(), few[0], few, recovery=STEPS).report
    careful, *others = report.recovery
    assert careful.kept
    assert any(step.kept for step in others)
    assert report.sqnr_db is not None
    assert report.sqnr_db > careful.sqnr_db_before > careful.sqnr_db_after


def test_careful_ranges_are_undone_if_what_was_built_on_them_is_better_without() -> None:
    model = Depthwise(torch.ones(16), nn.ReLU6).eval()
    few = DATA[:24]
    report = quantize(model, few[0], few, recovery=STEPS).report
    careful, *others = report.recovery
    assert not careful.kept
    assert any(step.kept for step in others)
    assert report.sqnr_db is not None
    assert report.sqnr_db > max(step.sqnr_db_after for step in report.recovery)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.PReLU])
def test_recovery_is_never_below_plain_int8(activation: type[nn.Module]) -> None:
    model = Depthwise(torch.linspace(0.5, 2, 16), activation).eval()
    few = DATA[:24]  # too few to hold some out, so that the whole is what it is judged by
    plain = quantize(model, few[0], few, explain=True).report.sqnr_db
    for steps in (STEPS, ("careful_ranges",), ("rounding",)):
        report = quantize(model, few[0], few, recovery=steps).report
        assert report.sqnr_db is not None
        assert plain is not None
        assert report.sqnr_db >= plain
        assert (report.sqnr_db == plain) == (not any(step.kept for step in report.recovery))


def test_layers_are_kept_in_float_until_max_drop_is_met() -> None:
    model = Depthwise(UNBALANCED).eval()
    result = quantize(model, DATA[0], DATA, max_drop=0)
    (accuracy,) = result.report.accuracy
    assert accuracy.measure == "agreement"
    assert accuracy.before - accuracy.after <= 0
    assert result.report.max_drop is not None
    assert result.report.max_drop.met
    kept = [layer for layer in result.layers if not layer.int8]
    names = [step.name for step in result.report.recovery]
    assert ("keeping_float" in names) == bool(kept)


def test_the_users_own_measure_decides_what_stays_in_float() -> None:
    model = Depthwise(UNBALANCED).eval()
    expected = outputs(model)

    def closeness(candidate: nn.Module) -> float:
        got = outputs(candidate)
        return 200.0 if torch.equal(got, expected) else min(sqnr_db(expected, got), 200.0)

    result = quantize(model, DATA[0], DATA, max_drop=60, evaluate=closeness)
    accuracy, agreement = result.report.accuracy
    assert accuracy.measure == "closeness"
    assert agreement.measure == "agreement"
    assert accuracy.before - accuracy.after <= 60
    assert [layer.int8 for layer in result.layers].count(False) >= 1
    assert result.report.recovery[-1].name == "keeping_float"
    assert "stay in float to meet max_drop=60" in result.report.notes[-1]


def test_labels_give_top_1_before_and_after() -> None:
    model = Depthwise(torch.ones(16)).eval()
    labels = outputs(model).argmax(1)
    result = quantize(model, DATA[0], DATA, labels=labels)
    top_1, agreement = result.report.accuracy
    assert (top_1.measure, top_1.before) == ("top-1", 100.0)
    assert top_1.after >= 90
    assert agreement.after == top_1.after  # the labels are what the model says


def test_a_drop_that_cannot_be_avoided_is_said() -> None:
    measured = iter([1.0, 0.0, 0.0, 0.0])

    def falling(_: nn.Module) -> float:
        return next(measured)

    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    with pytest.warns(QuantizationWarning, match="max_drop=0.1 is not met: falling drops by 1 wit"):
        result = quantize(model, DATA[0], DATA, evaluate=falling, max_drop=0.1)
    assert not result.layers[0].int8
    assert "is not met" in result.report.notes[0]
    assert result.report.max_drop == MaxDrop("falling", asked=0.1, reached=1.0, met=False)


def test_max_drop_needs_a_measure() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()  # returns no scores
    with pytest.raises(InputError, match=r"max_drop is about a measure, .* give evaluate"):
        quantize(model, DATA[0], DATA, max_drop=1)


def test_the_model_is_left_as_it_was() -> None:
    model = Depthwise(UNBALANCED).eval()
    before = copy.deepcopy(model.state_dict())
    quantize(model, DATA[0], DATA, recovery=["equalization", "bias_correction", "rounding"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recovery": ["equalisation"]}, "There is no recovery step 'equalisation'; there are"),
        ({"recovery": "rounding"}, r"Expected a list of recovery steps, got 'rounding'"),
        ({"max_drop": -1}, "Expected a max_drop of 0 points or more, got -1"),
        ({"max_drop": float("nan")}, "Expected a max_drop of 0 points or more, got nan"),
        ({"max_drop": "half"}, "Expected a max_drop of 0 points or more, got 'half'"),
        ({"evaluate": 3}, "Expected evaluate as a function that takes a model .* got int"),
        ({"scheme": "int7"}, "Expected a scheme of int8, int8_dynamic, int4, got 'int7'"),
    ],
)
def test_an_option_that_is_wrong_is_an_error(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize(Depthwise(torch.ones(16)).eval(), DATA[0], DATA, **options)


def test_the_scores_of_a_last_linear_layer_stay_in_float() -> None:
    """On int8 scores classes tie; the weights are in int8 all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 200)).eval()
    given = [noise(1, 16, seed=seed) for seed in range(40)]
    plain = quantize(model, given[0], given).model
    careful = quantize(model, given[0], given, recovery=["careful_ranges"])
    assert len(plain(given[0]).unique()) < 150
    assert len(careful.model(given[0]).unique()) > 190
    assert all(layer.int8 for layer in careful.layers)


def test_gradients_are_as_on_or_off_as_they_were() -> None:
    quantize(Depthwise(torch.ones(16)).eval(), DATA[0], DATA, recovery=["rounding"], explain=True)
    assert torch.is_grad_enabled()
