"""In an exported program batch norms are folded by rewriting the graph, and each one is proved."""

import copy
import io
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import torchfuse
from support.as_if_trained import as_if_trained
from support.foldable import count
from support.fusing_checks import IMAGE, ROW, assert_same, like
from support.zoo import HAND_WRITTEN, Entry
from torchfuse.errors import InputError
from torchfuse.fusing.programs import program_fusing, program_judging
from torchfuse.fusing.programs.program_fusing import FoldedProgram, fold
from torchfuse.graph.exported_program import read
from torchfuse.rules import RULES

# torch.export deep-copies its own pytree specs when it makes a module of a program.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


class Model(nn.Module):
    """Some layers, used as `body` says."""

    def __init__(self, body: Callable[["Model", Tensor], object]):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.up = nn.ConvTranspose2d(4, 4, 2, 2, groups=2)
        self.linear = nn.Linear(8, 8)
        self.drop = nn.Dropout()
        self.bn = nn.BatchNorm2d(4)
        self.bn2 = nn.BatchNorm2d(4, affine=False)
        self.bn1d = nn.BatchNorm1d(8)
        self.bn_rows = nn.BatchNorm1d(5)
        self.rows = nn.Linear(5, 5, bias=False)
        self.body = body

    def forward(self, x: Tensor) -> object:
        return self.body(self, x)


def exported(body: Callable[[Model, Tensor], object], inputs: Tensor = IMAGE) -> ExportedProgram:
    torch.manual_seed(0)
    model = as_if_trained(Model(body), lambda m: m(like(inputs, 5, 4)))
    return export(model, (inputs,))


def proved(program: ExportedProgram, inputs: Tensor = IMAGE) -> FoldedProgram:
    """Return the folded program, having compared it with the given one, which must not change."""
    before = {name: value.clone() for name, value in program.state_dict.items()}
    text = str(program.graph)
    folded = fold(program, prove=True)
    for case in (inputs, like(inputs, 1)):
        assert_same(program.module()(case.clone()), folded.program.module()(case.clone()))
    assert str(program.graph) == text
    assert all(torch.equal(before[name], value) for name, value in program.state_dict.items())
    return folded


def tied(m: Model, x: Tensor) -> Tensor:
    return m.bn2(F.conv2d(m.bn(m.conv(x)), m.conv.weight, m.conv.bias, padding=1))


def mapped(m: Model, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return m.bn2(m.conv2(y))

    y = m.bn(m.conv(x))
    return inner(y) if m.training else torch.vmap(inner)(y[None])[0]


FUSES = {
    "a conv": (1, lambda m, x: m.bn(m.conv(x))),
    "a conv without a bias": (1, lambda m, x: m.bn(m.conv2(x))),
    "no gamma and beta": (1, lambda m, x: m.bn2(m.conv(x))),
    "a grouped transposed conv": (1, lambda m, x: m.bn(m.up(x))),
    "a functional conv and batch norm": (
        1,
        lambda m, x: F.batch_norm(
            F.conv2d(x, m.conv.weight), m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias
        ),
    ),
    "dropout between": (1, lambda m, x: m.bn(m.drop(m.conv(x)))),
    "a linear flattened to rows": (1, lambda m, x: m.bn1d(m.linear(x).flatten(0, 2))),
    "a linear whose shape is read": (
        1,
        lambda m, x: m.bn1d((y := m.linear(x)).flatten(0, 2)).reshape_as(y),
    ),
    "a linear transposed to channels": (1, lambda m, x: m.bn1d(m.linear(x[:, 0]).transpose(1, 2))),
    "a conv called twice": (2, lambda m, x: m.bn2(m.conv(m.bn(m.conv(x))))),
    "a conv called twice, once with a batch norm": (1, lambda m, x: m.conv(m.bn(m.conv(x)))),
    "a batch norm called twice": (2, lambda m, x: m.bn(m.conv2(m.bn(m.conv(x))))),
    "two batch norms in a row": (2, lambda m, x: m.bn2(m.bn(m.conv(x)))),
    "two batch norms and dropout between": (2, lambda m, x: m.bn2(m.drop(m.bn(m.conv(x))))),
    "tied weights": (2, tied),
    "a weight that is read as a value": (1, lambda m, x: m.bn(m.conv(x)) + m.conv.weight.mean()),
    "a pair inside torch.vmap": (2, mapped),
    "a change in place afterwards": (1, lambda m, x: m.bn(m.conv(x)).add_(1).relu_()),
}


@pytest.mark.parametrize("name", FUSES)
def test_it_folds(name: str) -> None:
    times, body = FUSES[name]
    folded = proved(exported(body))
    assert len(folded.plan.fusions) == times, str(folded.plan)
    assert folded.plan.skips == ()
    assert "batch_norm" not in str(folded.program.graph)


def test_it_folds_a_linear_on_rows() -> None:
    folded = proved(exported(lambda m, x: m.bn_rows(m.rows(x)), ROW), ROW)
    assert [fusion.modules for fusion in folded.plan.fusions] == [("rows", "bn_rows")]
    assert "rows.bias" in folded.program.state_dict


def test_only_the_rules_asked_for_are_applied() -> None:
    program = exported(lambda m, x: m.bn2(m.up(m.bn(m.conv(x)))))
    every = [fusion.rule for fusion in fold(program, prove=True).plan.fusions]
    assert every == ["conv_bn", "conv_transpose_bn"]
    (one,) = fold(program, prove=True, rules=["conv_transpose_bn"]).plan.fusions
    assert one.modules == ("up", "bn2")
    nothing = fold(program, prove=True, rules=["linear_bn"]).plan
    assert nothing.fusions == nothing.skips == ()


LEFT_ALONE = {
    "another reader": (
        r"The output of `conv` is also read by another use: add\.",
        lambda m, x: m.bn(y := m.conv(x)) + y,
    ),
    "an output of the program": (
        r"is also an output of the model\.",
        lambda m, x: (m.bn(y := m.conv(x)), y),
    ),
    "a view that is read": (
        "is also read by another use: view",
        lambda m, x: (m.bn(y := m.conv(x)), y.view(-1)),
    ),
    "an activation between": (
        "comes from relu, not straight from a conv",
        lambda m, x: m.bn(F.relu(m.conv(x))),
    ),
    "a change in place between": (
        "comes from add, not straight from a conv",
        lambda m, x: m.bn(m.conv(x).add_(1)),
    ),
    "no layer before": ("is an input of the model", lambda m, x: m.bn(x)),
    "a computed weight": (
        "is computed, not stored",
        lambda m, x: m.bn(F.conv2d(x, m.conv.weight * 2)),
    ),
    "a part of a weight": (
        "The weight of `conv2d` is a part or a view of a stored tensor",
        lambda m, x: m.bn(F.conv2d(x.repeat(1, 2, 1, 1)[:, :2], m.conv.weight[:, :2])),
    ),
    "a view of a weight": (
        "The weight of `linear` is a part or a view",
        lambda m, x: m.bn1d(F.linear(x, m.linear.weight.t()).flatten(0, 2)),
    ),
    "a part of a bias": (
        "The bias of `conv2d` is a part or a view",
        lambda m, x: m.bn(F.conv2d(x, m.conv.weight, m.linear.bias[:4])),
    ),
    "a part of the statistics": (
        "The running_mean of `batch_norm` is a part or a view",
        lambda m, x: F.batch_norm(
            m.conv(x), m.bn1d.running_mean[:4], m.bn1d.running_var[4:], m.bn.weight, m.bn.bias
        ),
    ),
    "another axis": (
        r"not the channel axis \(2\) of the 3-D output of `linear`",
        lambda m, x: m.bn1d(m.linear(x[:, 0].repeat(1, 2, 1)[:, :8])),
    ),
    "a reshape that mixes channels": (
        "not the channels of `conv` in their order, moved by transpose, reshape",
        lambda m, x: m.bn(m.conv(x).transpose(1, 2).reshape(-1, 4, 8, 8)),
    ),
    "a dtype change": (
        "rounded to float16 before `bn`",
        lambda m, x: m.bn(m.conv(x).to(torch.float16).to(torch.float32)),
    ),
    "batch statistics": (
        "normalises by each batch",
        lambda m, x: F.batch_norm(m.conv(x), None, None, m.bn.weight, m.bn.bias, training=True),
    ),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_it_leaves_alone_and_says_why(name: str) -> None:
    reason, body = LEFT_ALONE[name]
    folded = proved(exported(body))
    assert folded.plan.fusions == ()
    (skip,) = folded.plan.skips
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(skip.reason)


def test_statistics_that_the_program_changes_are_skipped() -> None:
    def body(m: Model, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x))
        m.bn.running_mean.add_(1)
        return y

    program = exported(body)
    folded = fold(program, prove=False)
    assert folded.plan.fusions == ()
    assert "The running_mean of `bn` changes during the pass" in folded.plan.skips[0].reason


@pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning")  # nn.LSTM's own
@pytest.mark.parametrize("entry", HAND_WRITTEN, ids=lambda entry: entry.name)
def test_every_foldable_batch_norm_of_the_zoo_is_folded(entry: Entry) -> None:
    model = entry.model()
    program = export(model, (entry.inputs(),), strict=False)
    folded = fold(program, prove=True)
    assert len(folded.plan.fusions) == count(model, entry.inputs()).foldable
    inputs = entry.inputs(seed=7)
    expected, got = program.module()(inputs), folded.program.module()(inputs)
    for a, b in zip([*expected], [*got], strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()


def test_declared_dynamic_sizes_are_the_scope_and_stay_dynamic() -> None:
    model = as_if_trained(Model(lambda m, x: m.bn(m.conv(x))), lambda m: m(IMAGE))
    sizes = {0: Dim("batch", min=1, max=16), 2: Dim("height", min=4, max=64)}
    program = export(model, (IMAGE,), dynamic_shapes={"x": sizes})
    folded = proved(program)
    assert len(folded.plan.fusions) == 1
    assert any("from 4 to 64" in sentence for sentence in folded.plan.scope)
    for shape in ((1, 4, 4, 8), (7, 4, 30, 8)):
        other = torch.randn(shape)
        assert_same(program.module()(other), folded.program.module()(other))
    with pytest.raises(AssertionError):
        folded.program.module()(torch.randn(17, 4, 8, 8))


def test_a_shape_dependent_branch_is_decided_at_export_and_folded() -> None:
    folded = proved(exported(lambda m, x: m.bn(y := m.conv(x)) if x.shape[-1] <= 8 else y))
    assert len(folded.plan.fusions) == 1


def test_the_folded_program_can_be_saved_loaded_and_decomposed() -> None:
    program = exported(lambda m, x: m.bn(m.conv2(x)))
    folded = fold(program, prove=True).program
    buffer = io.BytesIO()
    torch.export.save(folded, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    assert_same(program.module()(IMAGE), loaded.module()(IMAGE))
    assert_same(program.module()(IMAGE), folded.run_decompositions().module()(IMAGE))


def test_running_the_new_program_does_not_change_the_old_one() -> None:
    def body(m: Model, x: Tensor) -> Tensor:
        return F.batch_norm(
            m.bn2(m.conv(x)), m.bn.running_mean, m.bn.running_var, training=True, momentum=0.5
        )

    program = exported(body)
    before = program.state_dict["bn.running_mean"].clone()
    folded = fold(program, prove=True)
    assert len(folded.plan.fusions) == 1
    folded.program.module()(IMAGE)
    assert torch.equal(program.state_dict["bn.running_mean"], before)
    assert not torch.equal(folded.program.state_dict["bn.running_mean"], before)


def test_an_input_with_the_name_of_a_builtin_keeps_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # what this test is about
            return self.bn(self.conv(input))

    folded = proved(export(Net().eval(), (IMAGE,)))
    assert folded.program.graph_signature.user_inputs == ("input",)


def test_names_that_python_cannot_write_are_no_obstacle() -> None:
    """The graph's code has an argument for each bias that folding adds."""

    def block() -> nn.Sequential:
        layers = {"conv-1": nn.Conv2d(4, 4, 1, bias=False), "1 norm": nn.BatchNorm2d(4)}
        return nn.Sequential(OrderedDict(layers))

    blocks = {"block1-0": block(), "block1 0": block(), "block1_0": block()}
    folded = proved(export(nn.Sequential(OrderedDict(blocks)).eval(), (IMAGE,)))
    assert len(folded.plan.fusions) == 3
    assert "block1-0.conv-1.bias" in folded.program.state_dict


def test_the_state_dict_keeps_the_keys_of_what_stayed() -> None:
    class ConvBn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, bias=False)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x))

    folded = fold(export(ConvBn().eval(), (IMAGE,)), prove=True)
    assert folded.program.state_dict.keys() == {"conv.weight", "conv.bias"}
    assert folded.key_map == {
        "conv.weight": "conv.weight",
        "bn.weight": "conv.weight",
        "bn.bias": "conv.bias",
        "bn.running_mean": "conv.bias",
        "bn.running_var": "conv.weight",
        "bn.num_batches_tracked": None,
    }
    assert isinstance(folded.program.state_dict["conv.bias"], nn.Parameter)
    (fusion,) = folded.plan.fusions
    assert fusion.parameters_saved == 4  # γ and β go, a bias comes
    assert fusion.macs_saved == 2 * 4 * 6 * 6
    assert fusion.traffic_saved_bytes == 2 * 4 * 2 * 4 * 6 * 6


def test_a_fold_that_is_one_percent_off_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    (rule,) = [rule for rule in RULES if rule.name == "conv_bn"]

    def one_percent_off(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
        weight, bias = rule.rewrite(layer, norm)
        return weight * 1.01, bias

    program = exported(lambda m, x: m.bn2(m.up(F.relu(m.bn(m.conv(x))))))
    wrong = [replace(r, rewrite=one_percent_off) if r is rule else r for r in RULES]
    monkeypatch.setattr(program_judging, "RULES", tuple(wrong))
    folded = proved(program)
    assert [fusion.modules for fusion in folded.plan.fusions] == [("up", "bn2")]
    (skip,) = folded.plan.skips
    assert skip.modules == ("conv", "bn")
    assert "The fold did not pass its proof: the folded layer is off by 0.0" in skip.reason


def test_a_program_without_example_inputs_cannot_be_proved() -> None:
    program = exported(lambda m, x: m.bn(m.conv(x)))
    program = copy.copy(program)
    program._example_inputs = None
    with pytest.raises(InputError, match="holds no example inputs to prove the fusions on"):
        fold(program, prove=True)
    assert len(fold(program, prove=False).plan.fusions) == 1


def test_fuse_exported_gives_the_program_the_plan_the_proof_and_the_key_map() -> None:
    program = exported(lambda m, x: m.bn(m.conv(x)))
    result = torchfuse.fuse_exported(program)
    assert isinstance(result.model, ExportedProgram)
    assert [fusion.modules for fusion in result.plan.fusions] == [("conv", "bn")]
    assert result.check.passed
    assert len(result.check.outputs) == 2  # the example inputs, and others like them
    assert result.key_map["bn.weight"] == "conv.weight"
    assert_same(program.module()(IMAGE), result.model.module()(IMAGE))


def doubled(x: Tensor, times: int) -> Tensor:
    """The fractional part of x · 2^times, made smooth: each step doubles what rounding did to x."""
    x = torch.sin(x) ** 2
    for _ in range(times):
        x = 4 * x * (1 - x)
    return x


@pytest.mark.parametrize("times", [16, 40], ids=["in float32", "in float64 too"])
def test_a_program_that_amplifies_rounding_is_fused(times: int) -> None:
    program = exported(lambda m, x: doubled(m.bn(m.conv(x)), times))
    result = torchfuse.fuse_exported(program)
    assert len(result.plan.fusions) == 1
    assert result.check.passed
    assert result.plan.scope == ("The exported method, in the modes it was exported in.",)
    other = like(IMAGE, 1)
    assert not torch.allclose(program.module()(other), result.model.module()(other), atol=1e-3)


def test_a_pair_that_amplifies_rounding_is_judged_in_float64() -> None:
    program = exported(lambda m, x: m.bn(m.conv(x)))
    program.state_dict["conv.bias"].data += 1e5  # the batch norm takes most of it away again
    program.state_dict["bn.running_mean"] += 1e5
    result = torchfuse.fuse_exported(program)
    assert len(result.plan.fusions) == 1
    assert result.check.passed


def only_in_float32(x: Tensor) -> Tensor:
    return (x.view(torch.int32) ^ torch.zeros_like(x, dtype=torch.int32)).view(torch.float32)


def test_an_amplifying_program_that_runs_in_float32_alone_keeps_what_its_pairs_show() -> None:
    program = exported(lambda m, x: doubled(only_in_float32(m.bn(m.conv(x))), 16))
    result = torchfuse.fuse_exported(program)
    assert len(result.plan.fusions) == 1
    assert "Each fusion was compared on its own" in result.plan.scope[-1]
    assert "does not run in float64" in result.plan.scope[-1]


def test_a_small_error_that_only_the_whole_program_shows_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two batch norms in a row, the first is not there to compare after the second."""
    program = exported(lambda m, x: doubled(m.bn(m.conv(x)), 16))
    monkeypatch.setattr(program_fusing, "pair_differences", lambda *_: {})
    (rule,) = [rule for rule in RULES if rule.name == "conv_bn"]

    def slightly_off(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
        weight, bias = rule.rewrite(layer, norm)
        return weight * (1 + 1e-5), bias

    wrong = [replace(r, rewrite=slightly_off) if r is rule else r for r in RULES]
    monkeypatch.setattr(program_judging, "RULES", tuple(wrong))
    result = torchfuse.fuse_exported(program)
    assert result.plan.fusions == ()
    assert "with it the program's outputs differ" in result.plan.skips[0].reason
    assert torch.equal(result.model.module()(IMAGE), program.module()(IMAGE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_percent_is_seen_in_half_precision_too(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = as_if_trained(Model(lambda m, x: m.bn(m.conv(x))), lambda m: m(like(IMAGE, 5, 4)))
    program = export(model.to(dtype), (IMAGE.to(dtype),))
    assert len(torchfuse.fuse_exported(program).plan.fusions) == 1
    (rule,) = [rule for rule in RULES if rule.name == "conv_bn"]

    def one_percent_off(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
        weight, bias = rule.rewrite(layer, norm)
        return weight * 1.01, bias

    wrong = [replace(r, rewrite=one_percent_off) if r is rule else r for r in RULES]
    monkeypatch.setattr(program_judging, "RULES", tuple(wrong))
    assert torchfuse.fuse_exported(program).plan.fusions == ()


def test_a_program_that_export_could_not_follow_is_an_error() -> None:
    def body(m: Model, x: Tensor) -> Tensor:
        return torch.func.vjp(lambda y: m.bn(m.conv(y)), x)[0]

    model = Model(body).eval()
    program = export(model, (IMAGE,))
    with pytest.raises(InputError, match=r"its constant 'conv\.lifted_tensor_0' has no values"):
        torchfuse.fuse_exported(program)


def test_fuse_exported_without_verifying_has_no_check() -> None:
    assert (
        torchfuse.fuse_exported(exported(lambda m, x: m.bn(m.conv(x))), verify=False).check is None
    )


def test_fuse_exported_with_an_unknown_rule_is_an_error() -> None:
    with pytest.raises(InputError, match="There is no rule 'conv_nb'; the rules are conv_bn"):
        torchfuse.fuse_exported(exported(lambda m, x: m.bn(m.conv(x))), rules=["conv_nb"])


def test_a_rule_is_tried_at_the_smallest_and_largest_declared_sizes_too() -> None:
    """The reshape mixes rows and features; which sizes were tried is in the graph."""

    def body(m: Model, x: Tensor) -> Tensor:
        y = m.linear(x[:, 0])  # [N, rows, 8]
        return m.bn1d(y.reshape(y.shape[0], 8, -1))

    model = as_if_trained(Model(body), lambda m: m(IMAGE))
    program = export(model, (IMAGE,), dynamic_shapes={"x": {0: Dim("batch", min=1, max=16)}})
    assert fold(program, prove=True).plan.fusions == ()
    read_ = read(program, program.graph, {})
    assert len(read_.graph.cases) == 2  # the smallest batch, taken as 2, is that of the example
    batches = {call.results[0].shape[0] for call in read_.graph.calls if call.kind == "linear"}
    assert batches == {2, 16}


def test_sizes_that_a_view_cannot_divide_are_not_tried() -> None:
    """The smallest batch, 2, would be no row of 5: `unflatten` divides by how many there are."""
    model = Model(lambda m, x: m.linear(x[:, 0, 0].unflatten(0, (-1, 5)))).eval()
    image = IMAGE[:1].repeat(5, 1, 1, 1)
    program = export(model, (image,), dynamic_shapes={"x": {0: Dim.DYNAMIC}})
    result = torchfuse.fuse_exported(program)
    torch.testing.assert_close(result.model.module()(image), model(image))


def test_nodes_that_view_the_same_memory_are_one_value_of_the_graph() -> None:
    def body(m: Model, x: Tensor) -> Tensor:
        y = m.conv(x)
        y.view(-1).mul_(2)
        return m.bn(y)

    program = exported(body)
    graph = read(program, program.graph, {}).graph
    (conv,) = [call for call in graph.calls if call.kind == "conv"]
    assert [call.kind for call in graph.readers(conv.results[0].value)] == [
        "view",
        "mul",
        "batch_norm",
    ]
    assert fold(program, prove=True).plan.fusions == ()
