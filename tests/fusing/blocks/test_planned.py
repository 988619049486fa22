"""The branches of a block are merged in the user's own module, which stays what it was."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchfuse
from support.fusing_checks import relative_difference, trained
from torchfuse.errors import FusionError, InputError
from torchfuse.graph.retracing import is_retraced

X = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A 3×3 convolution, a 1×1 one and the identity, each with its norm, added."""

    def __init__(self, channels: int = 4, groups: int = 1) -> None:
        super().__init__()
        self.dense = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.point = nn.Sequential(
            nn.Conv2d(channels, channels, 1, groups=groups, bias=False), nn.BatchNorm2d(channels)
        )
        self.skip = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.5)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self.dense(x) + self.point(x) + self.skip(x)))


class Net(nn.Module):
    """Blocks between two layers; `features` is a second way in."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 1)
        self.blocks = nn.Sequential(*(blocks or (Block(), Block(4, 4))))
        self.head = nn.Linear(4, 3)

    def features(self, x: Tensor) -> Tensor:
        return self.blocks(torch.tanh(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def make(*blocks: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return trained(Net(*blocks), X)


@pytest.fixture
def net() -> nn.Module:
    return make()


@pytest.fixture
def fused(net: nn.Module) -> nn.Module:
    result = torchfuse.fuse(net, X)
    assert result.check.passed
    assert convolutions(result.model) == 3
    return result.model


def convolutions(model: nn.Module) -> int:
    """How many convolutions and norms are left in it."""
    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
    return sum(isinstance(m, kinds) and len(list(m.parameters())) > 0 for m in model.modules())


def same(model: Callable[..., Tensor], net: nn.Module, x: Tensor = X) -> bool:
    with torch.no_grad():
        return relative_difference(net(x), model(x)) < 1e-5


def identical(a: nn.Module, b: nn.Module) -> bool:
    old, new = a.state_dict(), b.state_dict()
    return list(old) == list(new) and all(torch.equal(old[key], new[key]) for key in old)


class Scaled(Block):
    """A block whose code goes by a number of its own, in a layer that a trace does not enter."""

    class Factor(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, x: Tensor) -> Tensor:
            return x * self.by

    def __init__(self, by: float) -> None:
        super().__init__()
        self.point.append(self.Factor(by))


class KnowsItsBlock(Block):
    """A layer of it holds the block, beside the tree; it names its tensors its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.dense[0].owner = [self]

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[Any]:
        return ((f"own.{name}", tensor) for name, tensor in super().named_parameters())


class Offset(Block):
    """A block whose code goes by where in memory a tensor begins."""

    class Where(nn.Module):
        def __init__(self, first: int) -> None:
            super().__init__()
            self.register_buffer("ones", torch.ones(10)[first:])

        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + self.ones.storage_offset())

    def __init__(self, first: int) -> None:
        super().__init__()
        self.point.append(self.Where(first))


@pytest.mark.parametrize(
    ("blocks", "exports"),
    [
        ([Block(), Block(), Block()], 1),  # they differ in values alone
        ([Block(), Block(4, 4), Block()], 2),
        ([Scaled(2.0), Scaled(2.0), Scaled(3.0)], 2),
        ([Offset(0), Offset(1), Offset(2)], 3),
        ([KnowsItsBlock(), KnowsItsBlock(), Block()], 3),
    ],
)
def test_blocks_that_differ_in_values_alone_are_exported_once(
    blocks: list[nn.Module], exports: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []  # one for each export for all sizes: the blocks take one tensor
    export = torch.export.export

    def counted(*args: object, **kwargs: object) -> object:
        calls.extend(kwargs.get("dynamic_shapes", ()))
        return export(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.export, "export", counted)
    net = make(*blocks)
    result = torchfuse.fuse(net, X)
    assert len(calls) == exports
    assert convolutions(result.model) == 4  # the first layer, and one of each block
    assert same(result.model, net)
    assert identical(torchfuse.unfuse(result.model), net)


# ── what is merged ───────────────────────────────────────────────────────────────────────────────


class Summed(nn.Module):
    """Branches by name, added as `body` says."""

    def __init__(self, body: Callable[[nn.Module, Tensor], Tensor], **branches: nn.Module) -> None:
        super().__init__()
        self.body = body
        for name, branch in branches.items():
            setattr(self, name, branch)
        self.gamma = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def conv(kernel: int, **options: object) -> nn.Sequential:
    layer = nn.Conv2d(4, 4, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(4))


def adding(m: nn.Module, x: Tensor) -> Tensor:
    total = m.a(x)
    total += m.b(x)
    return torch.relu(total)


SUMS: dict[str, Callable[[], nn.Module]] = {
    "+": lambda: Summed(lambda m, x: m.a(x) + m.b(x), a=conv(3), b=conv(1)),
    "-": lambda: Summed(lambda m, x: m.a(x) - m.b(x), a=conv(1), b=conv(3)),
    "+=": lambda: Summed(adding, a=conv(3), b=conv(1)),
    "sum": lambda: Summed(lambda m, x: sum([m.a(x), m.b(x), x]), a=conv(3), b=conv(1)),
    "torch.add": lambda: Summed(lambda m, x: torch.add(m.a(x), m.b(x)), a=conv(3), b=conv(1)),
    "a bare norm": lambda: Summed(lambda m, x: m.a(x) + m.b(x), a=conv(3), b=nn.BatchNorm2d(4)),
    "a layer scale": lambda: Summed(lambda m, x: x + m.gamma * m.a(x), a=conv(3)),
    "a norm behind": lambda: Summed(
        lambda m, x: m.n(m.a(x) + m.b(x) + x), a=conv(3), b=conv(1), n=nn.BatchNorm2d(4)
    ),
    "a chain": lambda: Summed(
        lambda m, x: m.a(x) + m.b(x),
        a=conv(3),
        b=nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 4, 3, padding=1)),
    ),
    "depthwise": lambda: Summed(
        lambda m, x: m.a(x) + m.b(x), a=conv(5, groups=4), b=conv(3, groups=4)
    ),
    "an average pool": lambda: Summed(
        lambda m, x: m.a(x) + m.b(x), a=conv(3), b=nn.AvgPool2d(3, 1, 1)
    ),
    "blocks in a block": lambda: Summed(
        lambda m, x: x + m.gamma * (m.a(x) - m.b(x)),
        a=Summed(lambda m, x: m.a(x) + m.b(x), a=conv(3, groups=4), b=nn.BatchNorm2d(4)),
        b=Summed(lambda m, x: m.a(x), a=nn.BatchNorm2d(4)),
    ),
    "an alpha": lambda: Summed(
        lambda m, x: torch.add(m.a(x), m.b(x), alpha=0.3), a=conv(3), b=conv(1)
    ),
    "a stack": lambda: Summed(
        lambda m, x: torch.stack([m.a(x), m.b(x), x]).sum(0), a=conv(3), b=conv(1)
    ),
    "a mean of a stack": lambda: Summed(
        lambda m, x: torch.stack([m.a(x), m.b(x), x]).mean(0), a=conv(3), b=conv(1)
    ),
    "a mean of a stack with something else": lambda: Summed(
        lambda m, x: torch.mean(torch.stack([m.a(x), torch.relu(x), m.b(x)]), dim=0),
        a=conv(3),
        b=conv(1),
    ),
    "a padding of one side": lambda: Summed(
        lambda m, x: m.a(F.pad(x, (2, 0, 2, 0))) + m.b(x), a=nn.Conv2d(4, 4, 3), b=conv(1)
    ),
    "linear layers with a view between, beside": lambda: Summed(
        lambda m, x: m.a(x) + m.b(x) + m.d(m.c(x.mean((2, 3))).unsqueeze(1)).view(-1, 4, 1, 1),
        a=conv(3),
        b=conv(1),
        c=nn.Linear(4, 16),
        d=nn.Linear(16, 4),
    ),
    "a squeeze before it": lambda: Summed(
        lambda m, x: m.a(x * x.mean((2, 3), keepdim=True)) + x, a=conv(1)
    ),
}
LEFT = {"a squeeze before it": 2}


@pytest.mark.parametrize("name", SUMS)
def test_branches_become_one_layer(name: str) -> None:
    net = make(SUMS[name]())
    result = torchfuse.fuse(net, X)
    assert convolutions(result.model) == LEFT.get(name, 2), result.plan
    assert same(result.model, net)
    assert same(result.model, net, torch.randn(3, 4, 6, 11))
    wide = copy.deepcopy(net).double()
    exact = torchfuse.fuse(wide, X.double(), verify=False).model
    with torch.no_grad():
        assert relative_difference(wide(X.double()), exact(X.double())) < 1e-12
    assert identical(torchfuse.unfuse(result.model), net)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_blocks_of_any_dimensions_are_merged(dims: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    block = Summed(lambda m, x: m.a(x) + m.b(x) + x, a=conv(4, 4, 3, padding=1), b=conv(4, 4, 1))
    model = nn.Sequential(block, nn.ReLU()).eval()
    x = torch.randn(1, 4, *[5] * dims)
    result = torchfuse.fuse(model, x)
    assert convolutions(result.model) == 1
    assert same(result.model, model, x)


def test_linear_branches_are_merged() -> None:
    block = Summed(lambda m, x: m.a(x) + m.b(x) + x, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model = nn.Sequential(block, nn.ReLU()).eval()
    x = torch.randn(3, 5, 4)
    result = torchfuse.fuse(model, x)
    assert [fusion.rule for fusion in result.plan.fusions] == ["branches"]
    assert same(result.model, model, x)
    assert same(result.model, model, torch.randn(1, 2, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_merged_and_proven(dtype: torch.dtype) -> None:
    net = make().to(dtype)
    result = torchfuse.fuse(net, X.to(dtype))
    assert convolutions(result.model) == 3
    assert {p.dtype for p in result.model.parameters()} == {dtype}


def test_the_plan_says_what_fuse_does(net: nn.Module) -> None:
    plan, done = torchfuse.plan(net, X), torchfuse.fuse(net, X).plan
    assert [(f.rule, f.modules) for f in plan.fusions] == [
        (f.rule, f.modules) for f in done.fusions
    ]
    assert plan.skips == done.skips == ()
    merged = [fusion for fusion in done.fusions if fusion.rule == "branches"]
    assert len(merged) == 2
    assert merged[0].modules[0].startswith("blocks.0.")
    assert all(fusion.macs_saved > 0 and fusion.traffic_saved_bytes > 0 for fusion in merged)
    assert all(fusion.max_rel is not None and fusion.max_rel < 1e-5 for fusion in merged)
    assert "written anew" in str(plan)


def test_what_is_saved_is_of_the_example_and_not_of_the_batch_that_is_tried() -> None:
    one, two = (torchfuse.plan(make(), X[:n]).macs_saved for n in (1, 2))
    assert 2 * one == two


def test_only_the_rules_asked_for_are_applied(net: nn.Module) -> None:
    assert {f.rule for f in torchfuse.plan(net, X, rules=["conv_bn"]).fusions} == {"conv_bn"}
    result = torchfuse.fuse(net, X, rules=["conv_bn", "branches"])
    assert convolutions(result.model) == 3


# ── the same model ───────────────────────────────────────────────────────────────────────────────


def test_class_names_and_modules_stay(net: nn.Module, fused: nn.Module) -> None:
    block = fused.blocks[0]
    assert isinstance(block, Block)
    assert type(block).__name__ == "Block"
    assert is_retraced(block)
    assert not is_retraced(net.blocks[0])
    assert list(dict(fused.named_modules())) == list(dict(net.named_modules()))
    assert type(block.skip) is nn.Identity
    assert [key for key in fused.state_dict() if key.startswith("blocks.0")] == [
        "blocks.0.dense.0.weight",
        "blocks.0.dense.0.bias",
    ]


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


THROUGH: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": saved,
    "copy, pickle": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))),
    "unfuse, pickled": lambda model: torchfuse.unfuse(pickle.loads(pickle.dumps(model))),
    "script": torch.jit.script,
    "trace": lambda model: torch.jit.trace(model, X),
    "export": lambda model: torch.export.export(model, (X,)).module(),
    "compile": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("name", THROUGH)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_stays_goes_through(name: str, net: nn.Module, fused: nn.Module) -> None:
    assert same(THROUGH[name](fused), net)


def test_dropout_follows_the_training_flag(fused: nn.Module) -> None:
    torch.manual_seed(0)
    assert not torch.equal(fused.train()(X), fused(X))
    fused.eval()
    assert torch.equal(fused(X), fused(X))


def test_the_fused_block_can_be_trained(fused: nn.Module) -> None:
    fused(X).sum().backward()
    assert fused.blocks[0].dense[0].weight.grad is not None


def test_what_was_frozen_stays_frozen() -> None:
    net = make().requires_grad_(False)
    fused = torchfuse.fuse(net, X).model
    assert {p.requires_grad for p in fused.parameters()} == {False}
    fused.requires_grad_(True)
    assert {p.requires_grad for p in torchfuse.unfuse(fused).parameters()} == {True}


def test_hooks_on_the_block_are_called(net: nn.Module) -> None:
    calls: list[int] = []
    net.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    fused = torchfuse.fuse(net, X).model
    assert convolutions(fused) == 3
    calls.clear()
    fused(X)
    assert calls == [1]


def test_memory_format_random_state_and_the_model_itself_are_untouched(net: nn.Module) -> None:
    before, state = copy.deepcopy(net), torch.get_rng_state()
    torchfuse.fuse(net, X)
    torchfuse.plan(net, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert identical(net, before)
    assert type(net.blocks[0]) is Block
    last = X.to(memory_format=torch.channels_last)
    assert convolutions(torchfuse.fuse(net.to(memory_format=torch.channels_last), last).model) == 3


def test_a_batch_of_one_is_enough(net: nn.Module) -> None:
    fused = torchfuse.fuse(net, X[:1]).model
    assert convolutions(fused) == 3
    assert same(fused, net)


def test_in_place_it_is_the_model_itself(net: nn.Module) -> None:
    before = copy.deepcopy(net)
    assert torchfuse.fuse(net, X, inplace=True).model is net
    assert convolutions(net) == 3
    assert same(net, before)
    torchfuse.unfuse(net, inplace=True)
    assert identical(net, before)
    assert type(net.blocks[0]) is Block


# ── keys, checkpoints, and back again ────────────────────────────────────────────────────────────


def test_the_key_map_says_where_each_key_went(net: nn.Module) -> None:
    result = torchfuse.fuse(net, X)
    assert list(result.key_map) == list(net.state_dict())
    went = result.key_map["blocks.0.skip.weight"]
    assert went in ("blocks.0.dense.0.weight", "blocks.0.dense.0.bias")
    assert result.key_map["blocks.0.skip.num_batches_tracked"] is None
    assert result.key_map["stem.weight"] == "stem.weight"
    assert {key for key in result.key_map.values() if key} <= set(result.model.state_dict())


@pytest.mark.parametrize("keep", [True, False])
def test_an_old_checkpoint_is_merged_in(keep: bool, net: nn.Module) -> None:
    fused = torchfuse.fuse(net, X, keep_originals=keep).model
    other = trained(copy.deepcopy(net).train(), X * 3 + 1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    weight = fused.blocks[0].dense[0].weight
    torchfuse.load_unfused_state_dict(fused, other.state_dict())
    assert fused.blocks[0].dense[0].weight is weight
    assert same(fused, other)
    if keep:
        assert identical(torchfuse.unfuse(fused), other)


def test_a_checkpoint_that_does_not_fit_changes_nothing(net: nn.Module, fused: nn.Module) -> None:
    before = copy.deepcopy(fused.state_dict())
    state = {**net.state_dict(), "blocks.0.skip.weight": torch.zeros(5)}
    with pytest.raises(InputError, match=r"blocks.0.skip.weight has the shape \[5\]"):
        torchfuse.load_unfused_state_dict(fused, state)
    assert all(torch.equal(before[key], value) for key, value in fused.state_dict().items())
    assert is_retraced(fused.blocks[0])


def test_unfused_it_is_bit_for_bit_what_it_was(net: nn.Module, fused: nn.Module) -> None:
    restored = torchfuse.unfuse(fused)
    assert identical(restored, net)
    assert type(restored.blocks[0]) is Block
    assert torch.equal(restored(X), net(X))
    assert convolutions(torchfuse.fuse(restored, X).model) == 3


def test_unfuse_refuses_if_merged_weights_changed(fused: nn.Module) -> None:
    with torch.no_grad():
        fused.blocks[1].dense[0].weight[0, 0, 0, 0] += 1
    before = copy.deepcopy(fused.state_dict())
    with pytest.raises(FusionError, match=r"`blocks.1` have changed since"):
        torchfuse.unfuse(fused, inplace=True)
    assert all(torch.equal(before[key], value) for key, value in fused.state_dict().items())


def test_without_originals_it_cannot_be_unfused(net: nn.Module) -> None:
    fused = torchfuse.fuse(net, X, keep_originals=False).model
    with pytest.raises(FusionError, match=r"`blocks.1` was fused with keep_originals=False"):
        torchfuse.unfuse(fused)


def test_the_cost_of_keeping_originals_is_in_the_plan(net: nn.Module) -> None:
    kept = sum(
        tensor.numel() * tensor.element_size()
        for tensor in (*net.blocks.parameters(), *net.blocks.buffers())
    )
    assert torchfuse.fuse(net, X).plan.originals_bytes >= kept


def test_fusing_a_fused_model_changes_nothing_more(net: nn.Module, fused: nn.Module) -> None:
    again = torchfuse.fuse(fused, X)
    assert again.plan.fusions == ()
    assert same(again.model, net)


# ── what stays, and why ──────────────────────────────────────────────────────────────────────────


def on_values(m: nn.Module, x: Tensor) -> Tensor:
    return m.a(x) + m.b(x) if x.sum() > -1e9 else m.a(x)


class Twice(nn.Module):
    """Uses the branch of a block once more, beside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Summed(lambda m, x: m.a(x) + m.b(x), a=conv(3), b=conv(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.inner(x)) * torch.sigmoid(self.inner.b(x))


def hooked() -> nn.Module:
    block = Block()
    block.point.register_forward_hook(lambda *_: None)
    return block


def tied() -> nn.Module:
    blocks = nn.Sequential(Block(), nn.Conv2d(4, 4, 1, bias=False))
    blocks[1].weight = blocks[0].point[0].weight
    return blocks


class OfItsOwn(nn.Module):
    """Adds branches in its own forward, and is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class Changing(nn.Module):
    """Changes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x += self.a(x)
        return x


STAYS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a branch on values": (
        lambda: make(Summed(on_values, a=conv(3), b=conv(1))),
        "Its forward cannot be traced",
    ),
    "a tensor of numbers": (
        lambda: make(
            Summed(lambda m, x: (m.a(x) + m.b(x)) * torch.tensor(2.0), a=conv(3), b=conv(1))
        ),
        "Its forward makes a tensor of numbers",
    ),
    "a hook on a branch": (lambda: make(hooked()), "`blocks.0.point` has hooks"),
    "a weight that is used elsewhere": (
        lambda: make(tied()),
        "is also",
    ),
    "a branch that is called elsewhere": (
        lambda: make(Twice()),
        "`blocks.0.inner.b` is also used without `blocks.0.inner`",
    ),
    "functional dropout": (
        lambda: make(
            Summed(lambda m, x: F.dropout(m.a(x) + m.b(x), 0.1, m.training), a=conv(3), b=conv(1))
        ),
        "which is told the training mode",
    ),
    "an input that is changed": (lambda: make(Changing()), "changes what it is given"),
    "the model's own forward": (lambda: trained(OfItsOwn(), X), "its class is to stay"),
}


@pytest.mark.parametrize("name", STAYS)
def test_it_stays_and_says_why(name: str) -> None:
    makes, reason = STAYS[name]
    net = makes()
    result = torchfuse.fuse(net, X)
    found = [skip for skip in result.plan.skips if skip.rule == "branches"]
    assert [reason in skip.reason for skip in found] == [True], result.plan
    assert "graph=True" in found[0].hint or "Remove" in found[0].hint
    assert not [fusion for fusion in result.plan.fusions if fusion.rule == "branches"]
    assert same(result.model, net)


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)  # type: ignore[no-any-return]


class Pair(nn.Module):
    """Two blocks, each with a method that runs it alone, which is asked for before it is merged."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Added(), Added()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))

    def first(self, x: Tensor) -> Tensor:
        return self.one(x)  # type: ignore[no-any-return]

    def second(self, x: Tensor) -> Tensor:
        return self.two(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("verify", [True, False])
def test_in_place_what_is_asked_of_one_block_leaves_those_before_it_merged(verify: bool) -> None:
    net = Pair().eval()
    expected = net(X)
    fused = torchfuse.fuse(net, X, inplace=True, verify=verify).model
    assert [type(m).__name__ for m in (net.one.b, net.two.b)] == ["Identity", "Identity"]
    torch.testing.assert_close(fused(X), expected)
    torchfuse.unfuse(fused, inplace=True)
    assert torch.equal(net(X), expected)


def test_a_method_of_the_model_that_uses_a_branch_keeps_the_block_as_it_is() -> None:
    class Penalized(Net):
        def penalty(self, x: Tensor) -> Tensor:
            return (self.blocks[0].point(x) ** 2).sum()

    torch.manual_seed(0)
    net = trained(Penalized(Block()), X)
    result = torchfuse.fuse(net, X)
    assert [skip.modules for skip in result.plan.skips if skip.rule == "branches"] == [
        ("blocks.0",)
    ]
    assert torch.allclose(net.penalty(X), result.model.penalty(X), rtol=1e-4)


def test_a_branch_that_a_later_call_uses_alone_keeps_the_block_as_it_is() -> None:
    class Later(Net):
        is_warm = False

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if self.is_warm:
                y = y + self.blocks[0].point(x).mean()
            self.is_warm = True
            return y

    torch.manual_seed(0)
    net = trained(Later(Block()), X)
    net.is_warm = False
    result = torchfuse.fuse(net, X)
    assert [skip.modules for skip in result.plan.skips if skip.rule == "branches"] == [
        ("blocks.0",)
    ]
    for _ in range(2):
        assert torch.allclose(net(X), result.model(X), rtol=1e-4)


class WithRaw(Block):
    def raw(self, x: Tensor) -> Tensor:
        return self.dense(x) + self.point(x)


def test_a_method_of_the_block_that_the_model_calls_keeps_the_block_as_it_is() -> None:
    class Raw(Net):
        def raw(self, x: Tensor) -> Tensor:
            return self.blocks[0].raw(x)

    torch.manual_seed(0)
    net = trained(Raw(WithRaw()), X)
    result = torchfuse.fuse(net, X)
    (skip,) = [skip for skip in result.plan.skips if skip.rule == "branches"]
    assert skip.reason == "`blocks.0.dense` is also used without `blocks.0`."
    assert torch.allclose(net.raw(X), result.model.raw(X), rtol=1e-4)


def test_a_method_of_the_block_that_nothing_calls_does_not_keep_it() -> None:
    result = torchfuse.fuse(make(WithRaw()), X)
    assert [f.rule for f in result.plan.fusions if f.rule == "branches"] == ["branches"]


def test_a_model_without_values_is_not_merged() -> None:
    with torch.device("meta"):
        net = Net().eval()
    plan = torchfuse.plan(net, X.to("meta"))
    assert "meta device" in next(s.reason for s in plan.skips if s.rule == "branches")


def test_a_block_that_a_wrong_merge_would_change_is_left_as_it_is(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchfuse.fusing.blocks import planned

    right = planned.merged

    def wrong(block: nn.Module, args: list[Tensor], **options: object) -> object:
        merge = right(block, args, **options)
        if options["prove"] or args[0].dtype is torch.float64:
            for layer in merge.layers.values():
                layer.weight.data.mul_(1.01)
        return merge

    monkeypatch.setattr(planned, "merged", wrong)
    result = torchfuse.fuse(net, X)
    skipped = [skip for skip in result.plan.skips if skip.rule == "branches"]
    assert [skip.modules for skip in skipped] == [("blocks.0",), ("blocks.1",)]
    assert "the model's outputs differ" in skipped[0].reason
    assert result.check.passed
    assert type(result.model.blocks[0]) is Block
    assert same(result.model, net)


class Parted(nn.Module):
    """What it adds is a convolution of its input in another shape, whose sizes it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        pairs = x.reshape(count, channels // 2, 2 * height, width)
        return x + self.conv(pairs).reshape(count, channels, height, width)


def test_a_block_that_computes_with_sizes_is_exported_for_all_of_them_only_if_it_merges_at_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Simplifying what it computes may take seconds."""
    exported: list[bool] = []
    export = torch.export.export

    def watched(*args: Any, **kwargs: Any) -> Any:
        exported.append("dynamic_shapes" in kwargs)
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", watched)
    assert not [f for f in torchfuse.fuse(make(Parted()), X).plan.fusions if is_branches(f)]
    assert exported == [False]
    exported.clear()

    class Sized(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(x.shape[0], x.shape[1], x.shape[2], -1))

    assert [f for f in torchfuse.fuse(make(Sized()), X).plan.fusions if is_branches(f)]
    assert exported == [False, True]


def is_branches(fusion: torchfuse.Fusion) -> bool:
    return fusion.rule == "branches"
