"""The engine of the rewriting rules: what it asks of an edit, and how a program stays whole."""

import copy
import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram, export

import torchfuse
from support.rewriting_checks import Model, calls, fused, reasons, rules
from torchfuse.algebra import Affine, Layer
from torchfuse.errors import InputError, UnsupportedError
from torchfuse.fusing.programs import rewriting
from torchfuse.fusing.programs.rewrites import REWRITES, layer_affine

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

X = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {
        "conv": nn.Conv2d(4, 4, 3, padding=1),
        "conv2": nn.Conv2d(4, 4, 1, bias=False),
        "bn": nn.BatchNorm2d(4),
        "bn2": nn.BatchNorm2d(4),
    }


def exported(body: object) -> ExportedProgram:
    return export(Model(body, **layers()).eval(), (X,))


def repvgg(m: Model, x: Tensor) -> Tensor:
    return F.relu(m.bn(m.conv(x)) + m.bn2(m.conv2(x)) + x)


def test_rules_chain_until_nothing_is_left_to_do() -> None:
    def body(m: Model, x: Tensor) -> Tensor:
        y = 2 * (m.conv(x) * 0.5 + m.conv2(x) + x) - 1
        return m.bn(y) / 3

    assert calls(fused(body, X, **layers())) == {"conv2d": 1}


def test_a_wrong_edit_is_left_out_and_becomes_a_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layer_affine.after

    def one_percent_off(affine: Affine, layer: Layer) -> Layer:
        made = right(affine, layer)
        assert isinstance(made, Layer)
        return replace(made, weight=made.weight * 1.01)

    monkeypatch.setattr(layer_affine, "after", one_percent_off)
    result = torchfuse.fuse_exported(exported(lambda m, x: F.relu(m.conv(x) * 3) + m.conv2(x) + x))
    assert rules(result) == ["branches"]
    assert "layer_affine: The fusion did not pass its proof" in reasons(result)
    assert result.check.passed


def test_an_edit_that_rounding_amplifies_is_judged_in_float64() -> None:
    program = exported(lambda m, x: m.conv(x) - m.conv2(x))
    program.state_dict["conv.bias"].data += 1e5  # what is left of the sum is rounding
    program.state_dict["conv.weight"].data.mul_(1e-3)
    result = torchfuse.fuse_exported(program)
    assert rules(result) == ["branches"]
    assert result.check.passed


def test_each_fusion_says_how_far_it_moved_what_it_gives() -> None:
    result = torchfuse.fuse_exported(exported(lambda m, x: m.conv(x) * 3))
    (fusion,) = result.plan.fusions
    assert fusion.max_rel is not None
    assert 0 <= fusion.max_rel < 1e-6


def test_what_did_not_change_is_the_given_program() -> None:
    program = exported(lambda m, x: F.relu(m.conv(x)))
    assert rewriting.rewrite(program, prove=True).program is program


def test_only_the_rules_asked_for_are_used() -> None:
    program = exported(lambda m, x: F.relu(m.conv(x) * 3) + x + m.conv2(x))
    assert rules(torchfuse.fuse_exported(program, rules=["branches"])) == ["branches"]
    assert rules(torchfuse.fuse_exported(program, rules=["conv_bn"])) == []
    both = torchfuse.fuse_exported(program, rules=["branches", "layer_affine"])
    assert sorted(rules(both)) == ["branches", "layer_affine"]
    with pytest.raises(InputError, match=r"the rules are conv_bn, .* branches"):
        torchfuse.fuse_exported(program, rules=["branch"])


def test_a_program_without_example_inputs_is_merged_only_without_proof() -> None:
    program = copy.copy(exported(lambda m, x: m.conv(x) * 3))
    program._example_inputs = None
    with pytest.raises(InputError, match="holds no example inputs to prove the fusions on"):
        torchfuse.fuse_exported(program)
    assert rules(torchfuse.fuse_exported(program, verify=False)) == ["layer_affine"]


def test_keys_say_where_each_tensor_went() -> None:
    result = fused(repvgg, X, **layers())
    assert set(result.model.state_dict) == {"conv.weight", "conv.bias"}
    assert result.key_map == {
        "conv.weight": "conv.weight",
        "conv.bias": "conv.bias",
        "conv2.weight": "conv.weight",
        "bn.weight": "conv.weight",
        "bn.bias": "conv.bias",
        "bn.running_mean": "conv.bias",
        "bn.running_var": "conv.weight",
        "bn.num_batches_tracked": None,
        "bn2.weight": "conv.weight",
        "bn2.bias": "conv.weight",
        "bn2.running_mean": "conv.weight",
        "bn2.running_var": "conv.weight",
        "bn2.num_batches_tracked": None,
    }
    weight = result.model.state_dict["conv.weight"]
    assert isinstance(weight, nn.Parameter)
    assert weight.requires_grad


def test_a_weight_that_other_calls_read_is_kept_for_them() -> None:
    def body(m: Model, x: Tensor) -> Tensor:
        return F.relu(m.conv(x) * 3) + F.relu(m.conv(F.gelu(x)))

    result = fused(body, X, conv=nn.Conv2d(4, 4, 3, padding=1))
    assert set(result.model.state_dict) == {
        "conv.weight", "conv.bias", "conv.weight_folded", "conv.bias_folded"
    }  # fmt: skip


def test_the_merged_program_can_be_saved_loaded_decomposed_and_lowered() -> None:
    program = exported(repvgg)
    merged = torchfuse.fuse_exported(program).model
    buffer = io.BytesIO()
    torch.export.save(merged, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    expected = program.module()(X)
    for other in (loaded, merged.run_decompositions()):
        torch.testing.assert_close(other.module()(X), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.export.unflatten(merged)(X), expected, rtol=1e-4, atol=1e-5)
    again = export(merged.module(), (X,))
    torch.testing.assert_close(again.module()(X), expected, rtol=1e-4, atol=1e-5)


def test_an_output_keeps_its_name() -> None:
    program = exported(lambda m, x: (m.conv(x) * 3, m.conv2(x) + x, F.dropout(x, 0.5, False)))
    merged = torchfuse.fuse_exported(program).model
    assert merged.graph_signature.user_outputs == program.graph_signature.user_outputs


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # torch's own
def test_a_module_whose_signature_is_kept_can_be_unflattened() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    torch.manual_seed(0)
    model = Model(lambda m, x: m.a(x) + m.b(x) * 2, a=Branch(), b=Branch()).eval()
    program = export(model, (X,), preserve_module_call_signature=("a",))
    merged = torchfuse.fuse_exported(program)
    assert "signature of a module" in reasons(merged)
    torch.testing.assert_close(torch.export.unflatten(merged.model)(X), model(X))


def test_a_view_that_needs_the_layout_keeps_it() -> None:
    """What a sum of transposed tensors gives lies as they do, and a linear layer's output not."""

    def body(m: Model, x: Tensor) -> Tensor:
        y = x.transpose(1, 3)
        return (y + m.line(y)).transpose(1, 3).view(2, -1)

    program = export(Model(body, line=nn.Linear(4, 4)).eval(), (X,))
    torch.testing.assert_close(
        torchfuse.fuse_exported(program).model.module()(X), program.module()(X)
    )


def test_what_is_inside_vmap_stays() -> None:
    program = exported(lambda m, x: torch.vmap(lambda y: m.conv(y) * 3)(x[None])[0])
    assert torchfuse.fuse_exported(program).plan.fusions == ()


def test_a_rounded_value_between_is_not_skipped() -> None:
    result = fused(lambda m, x: m.conv(x).to(torch.float16).to(x.dtype) * 3, X, **layers())
    assert result.plan.fusions == ()


def changed_by_what_goes(m: Model, x: Tensor) -> object:
    return m.conv2(F.relu(x).mul_(2).div_(3))


def read_before(m: Model, x: Tensor) -> object:
    y = F.relu(x)
    before = y.exp()
    return m.conv2(y.mul_(2)), before


def read_through_an_older_view(m: Model, x: Tensor) -> object:
    y = F.relu(x)
    view = y[:, :2]
    return m.conv2(y.mul_(2)), view.exp()


def read_through_a_newer_view(m: Model, x: Tensor) -> object:
    y = F.relu(x)
    z = y.view(2, 4, 30)
    made = m.conv2(y.mul_(2))
    return made, z.view(2, 4, 6, 5).exp()


def changed_again(m: Model, x: Tensor) -> object:
    y = F.relu(x)
    view = y[:]
    made = m.conv2(y.mul_(2))
    view.add_(1)
    return made, view


@pytest.mark.parametrize("body", [changed_by_what_goes, read_before])
def test_a_change_in_place_goes_with_what_makes_it(body: object) -> None:
    assert "affine_layer" in rules(fused(body, X, **layers()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "body", [read_through_an_older_view, read_through_a_newer_view, changed_again]
)
def test_a_change_in_place_that_others_see_stays(body: object) -> None:
    result = fused(body, X, **layers())  # type: ignore[arg-type]
    assert result.plan.fusions == ()
    assert "changed in place" in reasons(result)


def test_a_change_of_the_input_itself_stays() -> None:
    program = export(Model(lambda m, x: m.conv2(x.mul_(2)), **layers()).eval(), (X.clone(),))
    assert torchfuse.fuse_exported(program, verify=False).plan.fusions == ()


def test_the_order_of_the_rules_is_written_down() -> None:
    assert [rule.name for rule in REWRITES][:2] == ["no_op", "cancelling"]


def test_a_module_can_be_fused_as_a_graph() -> None:
    model = Model(repvgg, **layers()).eval()
    before = copy.deepcopy(model.state_dict())
    result = torchfuse.fuse(model, X, graph=True)
    assert isinstance(result.model, torch.fx.GraphModule)
    assert set(result.model.state_dict()) == {"conv.weight", "conv.bias"}
    assert rules(result) == ["conv_bn", "conv_bn", "branches"]
    assert result.check.passed
    torch.testing.assert_close(result.model(X), model(X), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_graph_is_of_one_call_and_new() -> None:
    model = Model(repvgg, **layers()).eval()
    with pytest.raises(InputError, match="got 2 cases"):
        torchfuse.fuse(model, [X, X], graph=True)
    with pytest.raises(InputError, match="a new module"):
        torchfuse.fuse(model, X, graph=True, inplace=True)


class CallsItsBranchAlone(nn.Module):
    """From its second call on; `called` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.called = False
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.conv(x) + self.point(x) * self.calls
        if self.called:
            y = y + self.point(x)
        self.called = self.remembers
        return y

    remembers = True


def test_a_model_whose_second_call_is_another_is_not_made_a_graph() -> None:
    model = CallsItsBranchAlone().eval()
    with pytest.raises(UnsupportedError, match="when it is called again with the same inputs"):
        torchfuse.fuse(model, X, graph=True)
    assert not model.called


def test_what_a_graph_keeps_in_its_buffers_may_make_its_second_call_another() -> None:
    model = CallsItsBranchAlone().eval()
    model.remembers = False
    fused = torchfuse.fuse(model, X, graph=True).model
    for _ in range(3):
        torch.testing.assert_close(fused(X), model(X), rtol=1e-4, atol=1e-5)


def test_a_model_that_export_cannot_take_is_told_so() -> None:
    model = Model(lambda m, x: m.conv(x) if x.sum().item() > 0 else x, **layers()).eval()
    with pytest.raises(UnsupportedError, match=r"torch\.export cannot take this model"):
        torchfuse.fuse(model, X, graph=True)


@pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning")  # nn.LSTM's own
def test_calls_of_several_values_and_sizes_are_no_obstacle() -> None:
    def body(m: Model, x: Tensor) -> Tensor:
        y, (h, _) = m.lstm(x.flatten(2))
        return (y * y.shape[0] + h.mean()).chunk(2, -1)[0] * 3

    modules = {"lstm": nn.LSTM(30, 6, batch_first=True), **layers()}
    program = export(
        Model(body, **modules).eval(),
        (X,),
        dynamic_shapes=({0: torch.export.Dim("batch", max=8)},),
    )
    torch.testing.assert_close(
        torchfuse.fuse_exported(program).model.module()(X), program.module()(X)
    )
