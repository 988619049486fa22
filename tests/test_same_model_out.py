"""The fused model is the user's own model: what could be done with it before can be done after."""

import copy
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchfuse
from support.fusing_checks import relative_difference, trained
from torchfuse.errors import FusionError, InputError, TorchfuseError

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two foldable pairs and a classifier, with all that a user adds to a model."""

    version = 3

    def __init__(self, classes: int = 5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, classes)
        self.classes = [f"class {i}" for i in range(classes)]
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.bn(self.conv(x)))
        return self.head(self.drop(x.mean((2, 3)))) * self.scale

    def predict(self, x: Tensor) -> list[str]:
        return [self.classes[i] for i in self(x).argmax(1).tolist()]


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return trained(Net(), IMAGE)


@pytest.fixture
def fused(net: Net) -> Net:
    result = torchfuse.fuse(net, IMAGE)
    assert len(result.plan.fusions) == 2
    assert result.check.passed
    return result.model


def same_outputs(a: nn.Module, b: nn.Module, inputs: Tensor = IMAGE) -> bool:
    with torch.no_grad():
        return relative_difference(a(inputs), b(inputs)) < 1e-5


def identical(a: nn.Module, b: nn.Module) -> bool:
    old, new = a.state_dict(), b.state_dict()
    return list(old) == list(new) and all(torch.equal(old[key], new[key]) for key in old)


# ── class, methods, attributes, hooks, modes ─────────────────────────────────────────────────────


def test_class_methods_and_attributes_stay(net: Net, fused: Net) -> None:
    assert type(fused) is Net
    assert fused.predict(IMAGE) == net.predict(IMAGE)
    assert fused.classes == net.classes
    assert fused.version == 3
    assert list(dict(fused.named_modules())) == list(dict(net.named_modules()))
    assert type(fused.stem) is nn.Sequential
    assert type(fused.conv) is nn.Conv2d


def test_the_absorbed_batch_norm_becomes_an_identity(fused: Net) -> None:
    assert type(fused.bn) is nn.Identity
    assert type(fused.stem[1]) is nn.Identity


def test_hooks_stay_and_run(net: Net) -> None:
    calls = []
    net.register_forward_pre_hook(lambda module, args: calls.append("model before"))
    net.register_forward_hook(lambda module, args, output: calls.append("model after"))
    net.head.register_forward_hook(lambda module, args, output: output + 1)
    fused = torchfuse.fuse(net, IMAGE).model
    calls.clear()
    assert same_outputs(net, fused)
    assert calls == ["model before", "model after"] * 2


def test_training_flags_stay_each_on_its_own(net: Net) -> None:
    net.drop.train()
    fused = torchfuse.fuse(net, IMAGE).model
    flags = {name: module.training for name, module in net.named_modules()}
    assert {name: module.training for name, module in fused.named_modules()} == flags


def test_requires_grad_stays(net: Net) -> None:
    net.conv.weight.requires_grad_(False)
    fused = torchfuse.fuse(net, IMAGE).model
    assert not fused.conv.weight.requires_grad
    assert fused.conv.bias.requires_grad
    assert fused.stem[0].weight.requires_grad
    assert fused.head.weight.requires_grad


def test_parameters_stay_parameters_that_can_be_trained(fused: Net) -> None:
    for parameter in fused.parameters():
        assert isinstance(parameter, nn.Parameter)
        assert parameter.is_leaf
    fused(IMAGE).sum().backward()
    assert all(parameter.grad is not None for parameter in fused.parameters())


def test_planning_does_not_take_inference_mode_as_an_obstacle(net: Net) -> None:
    with torch.inference_mode():
        model = torchfuse.fuse(net, IMAGE).model
    model(IMAGE).sum().backward()  # its parameters are no inference tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_stay(net: Net, dtype: torch.dtype) -> None:
    net.to(dtype)
    fused = torchfuse.fuse(net, IMAGE.to(dtype)).model
    assert {parameter.dtype for parameter in fused.parameters()} == {dtype}


def test_the_device_stays() -> None:
    class OnMeta(Net):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2, device="meta")

    net = OnMeta().eval()
    fused = torchfuse.fuse(net, IMAGE).model
    assert fused.unused.weight.device.type == "meta"
    assert fused.conv.weight.device.type == "cpu"


def test_memory_format_stays(net: Net) -> None:
    net.to(memory_format=torch.channels_last)
    fused = torchfuse.fuse(net, IMAGE.to(memory_format=torch.channels_last)).model
    assert fused.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_parameter_order_and_names_stay(net: Net, fused: Net) -> None:
    kept = [name for name, _ in fused.named_parameters() if not name.startswith("stem.0.bias")]
    absorbed = ("bn.", "stem.1.")
    assert kept == [name for name, _ in net.named_parameters() if not name.startswith(absorbed)]


# ── copy, save, load ─────────────────────────────────────────────────────────────────────────────


def test_a_deep_copy_is_a_whole_fused_model(net: Net, fused: Net) -> None:
    copied = copy.deepcopy(fused)
    assert same_outputs(fused, copied)
    with torch.no_grad():
        copied.conv.weight.zero_()
    assert same_outputs(net, fused)
    assert identical(torchfuse.unfuse(fused), net)


def test_a_deep_copy_can_be_unfused_on_its_own(net: Net, fused: Net) -> None:
    restored = torchfuse.unfuse(copy.deepcopy(fused))
    assert identical(restored, net)
    assert type(fused.bn) is nn.Identity


def test_state_dict_holds_no_originals(net: Net, fused: Net) -> None:
    expected = {key for key in net.state_dict() if not key.startswith(("bn.", "stem.1."))}
    assert fused.state_dict().keys() == expected | {"stem.0.bias"}
    assert len(list(fused.buffers())) == 1
    assert sum(p.numel() for p in fused.parameters()) < sum(p.numel() for p in net.parameters())


def test_a_state_dict_round_trip_through_weights_only(net: Net, fused: Net) -> None:
    buffer = io.BytesIO()
    torch.save(fused.state_dict(), buffer)
    buffer.seek(0)
    other = torchfuse.fuse(trained(Net(), IMAGE + 1), IMAGE).model
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert same_outputs(net, other)


def test_the_whole_model_can_be_saved_and_loaded(net: Net, fused: Net) -> None:
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded) is Net
    assert same_outputs(net, loaded)


# ── export, trace, script, compile ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_takes_it(net: Net, fused: Net, strict: bool) -> None:
    program = torch.export.export(fused, (IMAGE,), strict=strict)
    assert "batch_norm" not in str(program.graph)
    assert relative_difference(net(IMAGE), program.module()(IMAGE)) < 1e-5


def test_torch_export_takes_it_with_a_dynamic_batch(net: Net, fused: Net) -> None:
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(fused, (IMAGE,), dynamic_shapes=(batch,))
    larger = torch.cat([IMAGE, IMAGE, IMAGE])
    assert relative_difference(net(larger), program.module()(larger)) < 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torch_jit_trace_takes_it(net: Net, fused: Net) -> None:
    traced = torch.jit.trace(fused, IMAGE)
    assert "batch_norm" not in str(traced.inlined_graph)
    assert relative_difference(net(IMAGE), traced(IMAGE)) < 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torch_jit_script_takes_it() -> None:
    torch.manual_seed(0)
    block = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), IMAGE)
    scripted = torch.jit.script(torchfuse.fuse(block, IMAGE).model)
    assert relative_difference(block(IMAGE), scripted(IMAGE)) < 1e-5


def test_torch_compile_takes_it_without_a_graph_break(net: Net, fused: Net) -> None:
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    assert relative_difference(net(IMAGE), compiled(IMAGE)) < 1e-5


def test_symbolic_trace_takes_it(net: Net, fused: Net) -> None:
    traced = torch.fx.symbolic_trace(fused)
    assert relative_difference(net(IMAGE), traced(IMAGE)) < 1e-5


# ── the original ─────────────────────────────────────────────────────────────────────────────────


def test_the_original_is_left_bit_identical(net: Net) -> None:
    before = copy.deepcopy(net)
    pointers = {name: parameter.data_ptr() for name, parameter in net.named_parameters()}
    result = torchfuse.fuse(net, IMAGE)
    assert result.model is not net
    assert identical(net, before)
    assert torch.equal(net(IMAGE), before(IMAGE))
    assert pointers == {name: parameter.data_ptr() for name, parameter in net.named_parameters()}
    assert type(net.bn) is nn.BatchNorm2d


def test_changing_the_fused_model_does_not_change_the_original(net: Net) -> None:
    before = copy.deepcopy(net)
    fused = torchfuse.fuse(net, IMAGE).model
    with torch.no_grad():
        for value in fused.state_dict().values():
            value.zero_()
    assert identical(net, before)


def test_in_place_changes_the_model_that_was_given(net: Net) -> None:
    before = copy.deepcopy(net)
    result = torchfuse.fuse(net, IMAGE, inplace=True)
    assert result.model is net
    assert type(net.bn) is nn.Identity
    assert same_outputs(before, net)


# ── keys and old checkpoints ─────────────────────────────────────────────────────────────────────


def test_key_map_says_where_each_old_key_went(net: Net) -> None:
    result = torchfuse.fuse(net, IMAGE)
    assert result.key_map["conv.weight"] == "conv.weight"
    assert result.key_map["head.weight"] == "head.weight"
    assert result.key_map["scale"] == "scale"
    assert result.key_map.keys() == net.state_dict().keys()
    targets = {key for key in result.key_map.values() if key is not None}
    assert targets <= result.model.state_dict().keys()


def test_an_old_checkpoint_loads_into_a_fused_model(net: Net) -> None:
    fused = torchfuse.fuse(trained(Net(), IMAGE * 2 + 1), IMAGE).model
    assert not same_outputs(net, fused)
    torchfuse.load_unfused_state_dict(fused, net.state_dict())
    assert same_outputs(net, fused)


def test_unfusing_after_loading_an_old_checkpoint_gives_that_checkpoint(net: Net) -> None:
    fused = torchfuse.fuse(trained(Net(), IMAGE * 2 + 1), IMAGE).model
    torchfuse.load_unfused_state_dict(fused, net.state_dict())
    assert identical(torchfuse.unfuse(fused), net)


def test_an_old_checkpoint_with_a_missing_key_is_refused_and_changes_nothing(net: Net) -> None:
    fused = torchfuse.fuse(net, IMAGE).model
    state = dict(net.state_dict())
    del state["bn.running_var"]
    before = copy.deepcopy(fused.state_dict())
    with pytest.raises(TorchfuseError, match=r"bn.running_var"):
        torchfuse.load_unfused_state_dict(fused, state)
    assert all(torch.equal(before[key], value) for key, value in fused.state_dict().items())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("head.weight", torch.zeros(5), r"head.weight has the shape \[5\], expected \[5, 8\]"),
        ("bn.weight", torch.zeros(7), r"bn.weight has the shape \[7\], expected \[8\]"),
        ("conv.weight", torch.zeros(8, 8, 1, 1), r"conv.weight has the shape"),
        ("head.bias", "zeros", "Expected a tensor for head.bias, got str"),
        ("bn.bias", 0.0, "Expected a tensor for bn.bias, got float"),
        ("more", torch.zeros(1), "not in it: more"),
    ],
)
def test_an_old_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(
    key: str, value: object, message: str, net: Net, fused: Net
) -> None:
    before = copy.deepcopy(fused.state_dict())
    with pytest.raises(InputError, match=message):
        torchfuse.load_unfused_state_dict(fused, {**net.state_dict(), key: value})
    assert all(torch.equal(before[key], value) for key, value in fused.state_dict().items())


class OwnNorm(nn.Module):
    """A norm of a class that is none of torch's, with what torch's hold."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in nn.BatchNorm2d(channels).state_dict().items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, False, 0.1, 1e-5)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, OwnNorm])
def test_a_checkpoint_from_before_norms_counted_their_batches_loads(norm: type[nn.Module]) -> None:
    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), norm(4)).eval()
        model[1].running_mean.uniform_()
        return model

    fused, other = torchfuse.fuse(made(0), IMAGE).model, made(1)
    state = {k: v for k, v in other.state_dict().items() if "num_batches_tracked" not in k}
    torchfuse.load_unfused_state_dict(fused, state)
    assert same_outputs(other, fused)


class NormThenPReLU(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def test_what_a_norm_holds_beside_its_own_is_loaded_with_an_old_checkpoint() -> None:
    def made(slope: float) -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), NormThenPReLU(4))
        nn.init.constant_(model[1].act.weight, slope)
        return trained(model, IMAGE)

    result, other = torchfuse.fuse(made(0.5), IMAGE), made(0.1)
    assert len(result.plan.fusions) == 1
    torchfuse.load_unfused_state_dict(result.model, other.state_dict())
    assert same_outputs(other, result.model)
    assert identical(torchfuse.unfuse(result.model), other)


def test_a_model_that_was_never_fused_loads_as_it_always_did(net: Net) -> None:
    with pytest.raises(
        FusionError, match=r"was not fused by torchfuse.fuse; use its own load_state_dict"
    ):
        torchfuse.load_unfused_state_dict(net, net.state_dict())


def test_what_is_no_checkpoint_at_all_is_refused(fused: Net) -> None:
    with pytest.raises(InputError, match="Expected a state_dict, from key to tensor, got list"):
        torchfuse.load_unfused_state_dict(fused, [("conv.weight", torch.zeros(1))])


def test_extra_state_is_loaded_with_an_old_checkpoint() -> None:
    class WithState(Net):
        state = 1

        def get_extra_state(self) -> dict[str, int]:
            return {"state": self.state}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.state = state["state"]

    model = trained(WithState(), IMAGE)
    fused = torchfuse.fuse(model, IMAGE).model
    model.state = 7
    torchfuse.load_unfused_state_dict(fused, model.state_dict())
    assert fused.state == 7


def test_a_fused_checkpoint_is_not_mistaken_for_an_old_one(net: Net, fused: Net) -> None:
    with pytest.raises(TorchfuseError, match=r"bn\."):
        torchfuse.load_unfused_state_dict(copy.deepcopy(fused), fused.state_dict())


# ── back again ───────────────────────────────────────────────────────────────────────────────────


def test_unfuse_restores_the_original_bit_for_bit(net: Net, fused: Net) -> None:
    restored = torchfuse.unfuse(fused)
    assert identical(restored, net)
    assert type(restored) is Net
    assert type(restored.bn) is nn.BatchNorm2d
    assert torch.equal(restored(IMAGE), net(IMAGE))
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    assert {name: p.requires_grad for name, p in restored.named_parameters()} == flags


def test_unfuse_restores_what_was_fused_in_place(net: Net) -> None:
    before = copy.deepcopy(net)
    torchfuse.fuse(net, IMAGE, inplace=True)
    assert identical(torchfuse.unfuse(net), before)


def test_a_restored_model_can_be_fused_again(net: Net, fused: Net) -> None:
    again = torchfuse.fuse(torchfuse.unfuse(fused), IMAGE)
    assert len(again.plan.fusions) == 2
    assert same_outputs(net, again.model)


def test_unfuse_restores_hooks_and_statistics(net: Net) -> None:
    calls = []
    net.bn.register_forward_hook(lambda module, args, output: calls.append(1))
    restored = torchfuse.unfuse(torchfuse.fuse(net, IMAGE).model)
    calls.clear()
    restored(IMAGE)
    assert calls == [1]


def test_unfuse_keeps_the_hooks_that_were_added_since(net: Net) -> None:
    calls: list[str] = []
    before = net.conv.register_forward_pre_hook(lambda module, args: calls.append("before"))
    torchfuse.fuse(net, IMAGE, inplace=True)
    net.conv.register_forward_hook(lambda module, args, output: calls.append("conv"))
    net.bn.register_forward_hook(lambda module, args, output: calls.append("bn"))
    torchfuse.unfuse(net, inplace=True)
    calls.clear()
    net(IMAGE)
    assert calls == ["before", "conv", "bn"]
    before.remove()
    net(IMAGE)
    assert calls == ["before", "conv", "bn", "conv", "bn"]


def test_unfuse_keeps_what_was_frozen_or_made_trainable_since(net: Net) -> None:
    net.stem[0].weight.requires_grad_(False)
    fused = torchfuse.fuse(net, IMAGE).model
    fused.requires_grad_(False)
    assert not any(p.requires_grad for p in torchfuse.unfuse(fused).parameters())
    fused.requires_grad_(True)
    assert all(p.requires_grad for p in torchfuse.unfuse(fused).parameters())


def test_unfuse_refuses_if_fused_weights_changed(fused: Net) -> None:
    with torch.no_grad():
        fused.conv.weight[0, 0, 0, 0] += 1
    with pytest.raises(FusionError, match=r"conv.*changed"):
        torchfuse.unfuse(fused)


def test_a_refused_unfuse_in_place_leaves_all_of_the_model_fused(fused: Net) -> None:
    with torch.no_grad():
        fused.stem[0].weight.mul_(2)  # the first pair: the others could be undone
    before = copy.deepcopy(fused.state_dict())
    with pytest.raises(FusionError, match=r"stem.0.*changed"):
        torchfuse.unfuse(fused, inplace=True)
    after = fused.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[key], after[key]) for key in before)


class TwoNorms(nn.Module):
    """The second batch norm follows a layer only once the first is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.conv(x)))


def test_what_two_calls_folded_into_one_layer_can_be_undone_and_loaded_into() -> None:
    model = trained(TwoNorms(), IMAGE)
    once = torchfuse.fuse(model, IMAGE)
    twice = torchfuse.fuse(once.model, IMAGE)
    assert [len(result.plan.fusions) for result in (once, twice)] == [1, 1]
    assert same_outputs(model, twice.model)
    assert identical(torchfuse.unfuse(twice.model), model)
    other = trained(TwoNorms(), IMAGE * 2 + 1)
    torchfuse.load_unfused_state_dict(twice.model, other.state_dict())
    assert same_outputs(other, twice.model)
    assert identical(torchfuse.unfuse(twice.model), other)


def test_a_compiled_model_can_be_fused_and_unfused(net: Net) -> None:
    compiled = torch.compile(net, backend="eager")
    fused = torchfuse.fuse(compiled, IMAGE).model
    assert same_outputs(net, fused)
    assert type(fused._orig_mod.bn) is nn.Identity
    assert identical(torchfuse.unfuse(fused)._orig_mod, net)


def test_unfuse_refuses_after_loading_a_fused_checkpoint(fused: Net) -> None:
    other = torchfuse.fuse(trained(Net(), IMAGE + 1), IMAGE).model
    fused.load_state_dict(other.state_dict())
    with pytest.raises(FusionError, match="changed"):
        torchfuse.unfuse(fused)


def test_unfuse_of_a_model_without_originals_says_why(net: Net) -> None:
    fused = torchfuse.fuse(net, IMAGE, keep_originals=False).model
    with pytest.raises(FusionError, match="keep_originals"):
        torchfuse.unfuse(fused)


def test_unfuse_of_a_model_that_was_never_fused_says_so(net: Net) -> None:
    with pytest.raises(FusionError, match=r"(?i)(not|never|nothing).*fuse"):
        torchfuse.unfuse(net)


def test_without_originals_nothing_of_them_is_kept_alive() -> None:
    net = trained(Net(), IMAGE)
    weight, statistics = weakref.ref(net.conv.weight), weakref.ref(net.bn.running_mean)
    result = torchfuse.fuse(net, IMAGE, inplace=True, keep_originals=False)
    del result
    assert weight() is None or weight() is net.conv.weight
    assert statistics() is None


def test_the_cost_of_keeping_originals_is_in_the_plan(net: Net) -> None:
    plan = torchfuse.fuse(net, IMAGE).plan
    kept = [net.conv.weight, net.conv.bias, net.stem[0].weight]
    kept += [*net.bn.parameters(), *net.stem[1].parameters()]
    kept += [net.bn.running_mean, net.bn.running_var]
    kept += [net.stem[1].running_mean, net.stem[1].running_var]
    expected = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    assert expected <= plan.originals_bytes <= expected + 64


def test_a_model_without_values_is_planned_and_fused_but_not_compared() -> None:
    with torch.device("meta"):
        model = Net().eval()
    assert len(torchfuse.plan(model, IMAGE.to("meta")).fusions) == 2
    with pytest.raises(InputError, match=r"meta device.*verify=False"):
        torchfuse.fuse(model, IMAGE.to("meta"))
    fused = torchfuse.fuse(model, IMAGE.to("meta"), verify=False).model
    assert fused.conv.weight.is_meta


def test_another_default_device_is_no_obstacle(net: Net) -> None:
    with torch.device("meta"):
        result = torchfuse.fuse(net, IMAGE)
    assert len(result.plan.fusions) == 2
    assert result.check.passed
    assert same_outputs(net, result.model)


def test_fusing_a_fused_model_changes_nothing_more(net: Net, fused: Net) -> None:
    again = torchfuse.fuse(fused, IMAGE)
    assert again.plan.fusions == ()
    assert same_outputs(net, again.model)


# ── plan, result, verify ─────────────────────────────────────────────────────────────────────────


def test_the_plan_is_data_that_saves_as_json(net: Net) -> None:
    plan = torchfuse.plan(net, IMAGE)
    assert torchfuse.FusionPlan.from_json(plan.to_json()) == plan
    assert {fusion.modules for fusion in plan.fusions} == {("stem.0", "stem.1"), ("conv", "bn")}
    assert all(fusion.rule in str(plan) for fusion in plan.fusions)
    assert [fusion.parameters_saved for fusion in plan.fusions] == [8, 16]


def test_savings_come_from_the_recorded_shapes(net: Net) -> None:
    first, second = torchfuse.plan(net, IMAGE).fusions
    activation = 2 * 8 * 8 * 8 * 4  # bytes; read and written once more without the fusion
    assert first.traffic_saved_bytes == second.traffic_saved_bytes == 2 * activation
    assert first.macs_saved == second.macs_saved == 2 * 8 * 8 * 8


def test_without_verifying_there_is_no_check(net: Net) -> None:
    result = torchfuse.fuse(net, IMAGE, verify=False)
    assert result.check is None
    assert same_outputs(net, result.model)


def test_verify_reports_each_output(net: Net, fused: Net) -> None:
    check = torchfuse.verify(net, fused, IMAGE)
    assert check.passed
    assert check.max_rel < 1e-5
    assert check.sqnr_db > 100
    assert len(check.outputs) == 1


def test_verify_fails_a_scale_that_is_one_percent_off(net: Net) -> None:
    check = torchfuse.verify(net, lambda x: net(x) * 1.01, IMAGE)
    assert not check.passed
    assert check.max_rel == pytest.approx(0.01, rel=1e-3)
    assert check.sqnr_db == pytest.approx(40, abs=0.1)


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y * float("nan"),
        lambda y: y + float("inf"),
        lambda y: y[:1],
        lambda y: y.double(),
        lambda y: (y, y),
        lambda y: {"y": y},
        lambda y: None,
    ],
)
def test_verify_fails_nan_inf_and_other_shapes_dtypes_and_structures(change: object) -> None:
    check = torchfuse.verify(lambda x: x + 1, lambda x: change(x + 1), IMAGE)
    assert not check.passed
    assert check.problems


@pytest.mark.parametrize("rules", [["conv_bn"], ("conv_bn",)])
def test_only_the_rules_asked_for_are_applied(net: Net, rules: object) -> None:
    assert {fusion.rule for fusion in torchfuse.plan(net, IMAGE, rules=rules).fusions} == {
        "conv_bn"
    }


def test_an_unknown_rule_is_an_error_with_near_matches(net: Net) -> None:
    with pytest.raises(InputError, match="conv_bn"):
        torchfuse.plan(net, IMAGE, rules=["conv_nb"])
