"""A batch norm class that does more keeps what it does, without its batch norm."""

import copy
import io
import pickle
import random
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchfuse
from support.fusing_checks import (
    IMAGE,
    ConvBn,
    NormAct,
    assert_skipped,
    relative_difference,
    trained,
)
from torchfuse.errors import UnsupportedError
from torchfuse.graph import retracing
from torchfuse.graph.retracing import is_retraced, without_batch_norm


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, bias=False)
        self.bn = NormAct()
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.bn2 = NormAct()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn(self.conv(x))))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return trained(Net(), IMAGE)


@pytest.fixture
def fused(net: nn.Module) -> nn.Module:
    result = torchfuse.fuse(net, IMAGE)
    assert [fusion.modules for fusion in result.plan.fusions] == [
        ("conv", "bn"),
        ("conv2", "bn2"),
    ]
    assert result.check.passed
    return result.model


def same(model: nn.Module, net: nn.Module) -> bool:
    with torch.no_grad():
        return relative_difference(net(IMAGE), model(IMAGE)) < 1e-5


def test_the_batch_norm_is_gone_and_the_activation_stays(net, fused) -> None:
    assert same(fused, net)
    assert is_retraced(fused.bn)
    assert not is_retraced(net.bn)
    assert isinstance(fused.bn, NormAct)
    assert [name for name, _ in fused.bn.named_children()] == ["drop", "act"]
    assert list(fused.bn.state_dict()) == []
    traced = torch.export.export(fused, (IMAGE,)).graph
    targets = [str(node.target) for node in traced.nodes]
    assert not any("batch_norm" in target for target in targets)
    assert sum("relu" in target for target in targets) == 2


def test_in_float64_the_outputs_agree_to_the_last_digits(net) -> None:
    wide, inputs = net.double(), IMAGE.double()
    fused = torchfuse.fuse(wide, inputs).model
    assert len(torchfuse.fuse(wide, inputs).plan.fusions) == 2
    with torch.no_grad():
        assert relative_difference(wide(inputs), fused(inputs)) < 1e-14


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "through",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        saved,
        lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))),
        torch.jit.script,
        lambda model: torch.jit.trace(model, IMAGE),
        lambda model: torch.export.export(model, (IMAGE,)).module(),
        lambda model: torch.compile(model, backend="eager"),
    ],
    ids=["copy", "pickle", "save", "copy, pickle", "script", "trace", "export", "compile"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_stays_goes_through(net, fused, through) -> None:
    assert same(through(fused), net)


def test_a_copy_is_of_the_same_class(fused) -> None:
    assert type(copy.deepcopy(fused).bn) is type(fused.bn) is type(fused.bn2)
    assert type(pickle.loads(pickle.dumps(fused)).bn) is type(fused.bn)


def test_dropout_and_activation_follow_the_training_flag(fused) -> None:
    torch.manual_seed(0)
    assert not torch.equal(fused.train()(IMAGE), fused(IMAGE))
    fused.eval()
    assert torch.equal(fused(IMAGE), fused(IMAGE))


def test_unfused_it_is_bit_for_bit_what_it_was(net, fused) -> None:
    back = torchfuse.unfuse(fused)
    assert type(back.bn) is NormAct
    assert list(back.state_dict()) == list(net.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(back.state_dict().values(), net.state_dict().values(), strict=True)
    )
    with torch.no_grad():
        assert torch.equal(back(IMAGE), net(IMAGE))


def test_an_old_checkpoint_loads(net, fused) -> None:
    with torch.no_grad():
        net.bn.weight.mul_(2)
    assert not same(fused, net)
    torchfuse.load_unfused_state_dict(fused, net.state_dict())
    assert same(fused, net)


def test_a_fused_model_has_nothing_left_to_fuse_or_to_skip(fused) -> None:
    plan = torchfuse.plan(fused, IMAGE)
    assert (plan.fusions, plan.skips) == ((), ())


def test_a_hook_put_on_later_stays_when_unfused(net, fused) -> None:
    seen: list[int] = []
    fused.bn.register_forward_hook(lambda *_: seen.append(1))
    fused(IMAGE)
    torchfuse.unfuse(fused, inplace=True)(IMAGE)
    assert seen == [1, 1]


class Residual(NormAct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight.reshape(1, -1, 1, 1)


class Twice(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return y + F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class Remembers(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class Writes(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        self.calls.add_(1)
        return y


class Branches(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return y if x.shape[0] > 100 else y + 1


class Drops(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return F.dropout(y, 0.5, self.training)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (Residual, "reads `weight` beside the batch norm"),
        (Twice, "calls a batch norm 2 times"),
        (Remembers, "changes attributes"),
        (Writes, "writes to a tensor of its own"),
        (Branches, "cannot be traced"),
        (Drops, "is told the training mode"),
    ],
)
def test_a_class_from_which_the_batch_norm_cannot_be_taken_is_skipped(norm, reason) -> None:
    module = norm(4).eval()
    before = {**vars(module)}
    with pytest.raises(UnsupportedError, match=reason):
        without_batch_norm(module)
    assert vars(module) == before
    assert_skipped(trained(ConvBn(bn=norm(4)), IMAGE), IMAGE, because="own forward|also|more")


class AsksForTheDtype(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return F.relu(y) if x.dtype is torch.float32 else y


class AsksForTheType(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return F.relu(y) if type(x) is Tensor else y


class TakesAResidual(nn.BatchNorm2d):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return y if residual is None else y + residual


class CallsAChildOnlyForTensors(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return self.act(y) if isinstance(x, Tensor) else y


class Rescales(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias).relu()

    def rescale(self, x: Tensor) -> Tensor:
        return x * self.weight.mean()


CALLS = [0]


class Counts(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        CALLS[0] += 1
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return y * CALLS[0]


class WithoutSubclasses(nn.BatchNorm2d):
    def __init_subclass__(cls, *, tag: str) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias).relu()


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (AsksForTheDtype, "does something else when it is traced"),
        (AsksForTheType, "does something else when it is traced"),
        (TakesAResidual, "does something else when it is traced"),
        (CallsAChildOnlyForTensors, "does something else when it is traced"),
        (Rescales, "whose method rescale reads `weight`"),
        (Counts, "does something else at every call"),
        (WithoutSubclasses, "has no subclasses"),
    ],
)
def test_a_class_that_is_not_what_tracing_it_shows_is_skipped(norm, reason) -> None:
    model = ConvBn(bn=norm(4)).eval()
    with torch.no_grad():
        model.bn.running_mean.normal_()
        model.bn.bias.normal_()
    plan = torchfuse.plan(model, IMAGE)
    assert plan.fusions == ()
    assert reason in plan.skips[0].reason


def test_tracing_leaves_no_trace() -> None:
    class Leaves(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
            self.seen.append(x)
            return y + torch.rand(1) + random.random()

    module = Leaves(4).eval()
    states = torch.random.get_rng_state(), random.getstate()
    with pytest.raises(UnsupportedError, match="changes attributes"):
        without_batch_norm(module)
    assert module.seen == []
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_random_numbers_of_another_thread_do_not_make_a_model_draw(net: nn.Module) -> None:
    drawn, over = 0, threading.Event()

    def draw() -> None:
        nonlocal drawn
        while not over.is_set():
            random.random()
            drawn += 1

    thread = threading.Thread(target=draw)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that it draws within the shortest of runs
    thread.start()
    try:
        plan = torchfuse.plan(net, IMAGE)
    finally:
        sys.setswitchinterval(interval)
        over.set()
        thread.join()
    assert drawn > 1000
    assert [fusion.modules for fusion in plan.fusions] == [("conv", "bn"), ("conv2", "bn2")]


@pytest.mark.parametrize("keep_originals", [True, False])
def test_an_activation_with_weights_of_its_own_loads_from_an_old_checkpoint(keep_originals) -> None:
    model = Net()
    model.bn.act = nn.PReLU()
    model = trained(model, IMAGE)
    result = torchfuse.fuse(model, IMAGE, keep_originals=keep_originals)
    assert len(result.plan.fusions) == 2
    assert result.key_map["bn.act.weight"] == "bn.act.weight"
    with torch.no_grad():
        model.bn.act.weight.fill_(0.7)
        model.bn.running_mean.add_(1)
    torchfuse.load_unfused_state_dict(result.model, model.state_dict())
    assert same(result.model, model)


class Many(nn.Module):
    """Pairs of one norm class, of different widths."""

    def __init__(self, norm: type[nn.BatchNorm2d], widths: tuple[int, ...] = (4, 8, 16, 8)) -> None:
        super().__init__()
        before = (4, *widths)
        self.pairs = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 1), norm(b))
                for a, b in zip(before, widths, strict=False)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.pairs(x)


def traces(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list that grows by each norm that is traced."""
    seen: list[object] = []
    trace = retracing._Tracer.trace

    def counted(tracer: object, root: nn.Module, *args: object) -> object:
        seen.append(root)
        return trace(tracer, root, *args)

    monkeypatch.setattr(retracing._Tracer, "trace", counted)
    return seen


def test_norms_of_one_class_and_other_widths_are_traced_once(monkeypatch) -> None:
    model = trained(Many(NormAct), IMAGE)
    seen = traces(monkeypatch)
    result = torchfuse.fuse(model, IMAGE)
    assert len(result.plan.fusions) == 4
    assert len(seen) == 2


class Gentle(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.slope = 1 / channels

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return F.leaky_relu(y, self.slope)


class OfItsWidth(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return F.leaky_relu(y, 1 / self.num_features)


class AtOneWidth(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return F.leaky_relu(y, 0.5 if self.num_features == 16 else 0.1)


class OfAChildsSetting(NormAct):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.LeakyReLU(1 / channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return F.leaky_relu(y, self.act.negative_slope)


@pytest.mark.parametrize("norm", [Gentle, OfItsWidth, AtOneWidth, OfAChildsSetting])
def test_norms_of_one_class_that_differ_in_what_they_do_are_each_traced(norm) -> None:
    model = trained(Many(norm), IMAGE)
    result = torchfuse.fuse(model, IMAGE, verify=False)
    assert len(result.plan.fusions) == 4
    with torch.no_grad():
        assert relative_difference(model(IMAGE), result.model(IMAGE)) < 1e-5


FACTOR = {"": 1.0}


class OfAGlobal(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return y * FACTOR[""]


def test_what_was_traced_is_forgotten_after_each_fusion(monkeypatch) -> None:
    model = trained(Many(OfAGlobal), IMAGE)
    torchfuse.fuse(model, IMAGE, verify=False)
    monkeypatch.setitem(FACTOR, "", 2.0)
    result = torchfuse.fuse(model, IMAGE, verify=False)
    assert len(result.plan.fusions) == 4
    with torch.no_grad():
        assert relative_difference(model(IMAGE), result.model(IMAGE)) < 1e-5
