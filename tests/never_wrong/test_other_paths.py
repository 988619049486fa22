"""Code that may go another way for other inputs: run, and judged there too."""

import collections
import contextlib
import math
import weakref
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchfuse
from support.fusing_checks import IMAGE, ConvBn, assert_fuses, assert_skipped, trained


class ReadsShapes(ConvBn):
    """A size is read and compared elsewhere in the model, as for an interpolation."""

    def forward(self, x):
        y = self.normed(x)
        if y.shape[-2:] != x.shape[-2:]:
            y = F.interpolate(y, size=x.shape[-2:])
        return y

    def normed(self, x):
        return self.bn(self.conv(x))


class PadsBetween(ReadsShapes):
    """Pads on both sides of a branch on a size, before the conv."""

    def normed(self, x):
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        y = self.conv(x)
        return self.bn(y)


class Block(ConvBn):
    def forward(self, x, norm=True, activate=True):
        y = self.conv(x)
        if norm:
            y = self.bn(y)
        return F.relu(y) if activate else y


class WithFlags(nn.Module):
    """What mmcv's ConvModule does: flags that the caller hands over."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        y = self.block(x, activate=False)
        return F.interpolate(y, size=x.shape[-2:]) if y.shape[-1] < x.shape[-1] else y


class Checkpointed(ConvBn):
    """A branch behind a flag of the configuration that is off."""

    with_cp = False

    def forward(self, x):
        def inner(x):
            return self.bn(self.conv(x))

        if self.with_cp and x.requires_grad:
            return checkpoint(inner, x, use_reentrant=False)
        return inner(x)


class Methods(ConvBn):
    """A method that runs the pair in a straight line, beside one that nobody calls."""

    def forward(self, x):
        return self.last(x)

    def last(self, x):
        return self.bn(self.conv(x))

    def features(self, x):
        y = self.conv(x)
        y = self.bn(y)
        return [y, F.relu(y)]

    def as_sequential(self):
        return nn.Sequential(self.conv, self.bn)


class Inner(ConvBn):
    """A helper for what the configuration has off."""

    memory_efficient = False

    def both(self, x):
        y = self.conv(x)
        return y if y.dim() > 4 else self.bn(y)

    def rarely(self, x):
        return checkpoint(self.both, x, use_reentrant=False)

    def forward(self, x):
        if self.memory_efficient and x.requires_grad:
            return self.rarely(x)
        return self.both(x)


class TwoOfThem(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = Inner(), Inner()

    def forward(self, x):
        return self.other(self.one(x))


class Intermediates(ConvBn):
    """As in timm: more arguments than forward has, and children by names that stand there."""

    def __init__(self):
        super().__init__()
        self.layer1, self.layer2 = nn.ReLU(), nn.Tanh()

    def forward(self, x):
        return self.layer2(self.layer1(self.bn(self.conv(x))))

    def forward_intermediates(self, x, stop_early=False):
        x = self.conv(x)
        x = self.bn(x)
        found = [x]
        names = ("layer1", "layer2")
        if stop_early:
            names = names[:1]
        for name in names:
            x = getattr(self, name)(x)
            found.append(x)
        return found


class Stem(nn.Sequential):
    """A static method, whose first argument is no module."""

    def __init__(self):
        super().__init__(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    @staticmethod
    def strides(stride):
        return stride, stride

    def clone_of(self):
        return self.strides(1)


@pytest.mark.parametrize(
    ("model", "times"),
    [
        (ReadsShapes, 1),
        (PadsBetween, 1),
        (WithFlags, 1),
        (Checkpointed, 1),
        (Methods, 1),
        (TwoOfThem, 2),
        (Intermediates, 1),
        (Stem, 1),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_what_holds_on_every_way_is_fused(model, times, strict):
    torch.manual_seed(0)
    model = trained(model(), IMAGE)
    odd = torch.randn(2, 4, 7, 9)
    assert_fuses(model, IMAGE, times, others=(odd,))
    assert len(torchfuse.plan(model, IMAGE, strict=strict).fusions) == times


def branching(condition):
    """Return a model whose batch norm is skipped where `condition(x)` is false."""

    class Model(ConvBn):
        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) if condition(x) else y

    return Model


def flagged(condition):
    """Return a model that hands `condition(x)` to its block as a flag."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(x, norm=condition(x))

    return Model


CONDITIONS = [
    lambda x: x.shape[-1] > 5,
    lambda x: x.shape[-1] * 0.5 > 2.5,
    lambda x: 0.5 * x.shape[-1] > 2.5,
    lambda x: x.shape[-1] > 5.5,
    lambda x: int(x.shape[-1]) > 5,
    lambda x: {8: True}.get(x.shape[-1], False),
    lambda x: x.shape[-1] in {8, 16},
    lambda x: len(x.unbind(-1)) > 5,
    lambda x: math.log2(x.shape[-1]) > 2.5,
    lambda x: len(range(x.shape[-1])) > 5,
    lambda x: x.numel() > 200,
    lambda x: x.shape.numel() > 200,
    lambda x: [False, False, True][x.shape[-1] // 4],
    lambda x: float(x.shape[-1]) > 5,
    lambda x: x.stride(-2) > 5,
    lambda x: bool(x.shape[-1] - 4),
    lambda x: not x.shape[-1] < 6,
    lambda x: max(x.shape[-1], x.shape[-2]) > 5,
    lambda x: x.shape[-1] > 5 and x.shape[-2] > 5,
    lambda x: x.shape == (2, 4, 8, 8) or x.shape[0] != 2 or x.shape[-1] > 5,
]
# All true at 4 and 8; what is compared is a plain number by then, or no number at all.
BEYOND = [
    lambda x: 0.5 * x.shape[-1] < 10,
    lambda x: x.shape.numel() < 2000,
    lambda x: math.log2(x.shape[-1]) < 4.5,
    lambda x: math.sqrt(x.shape[-1] / 2) < 3.5,
    lambda x: len(range(x.shape[-1])) < 20,
    lambda x: len(x.unbind(-1)) < 20,
    lambda x: len(x.split(8, -1)) < 3,
    lambda x: f"{x.shape[-1]}" in ("8", "4"),
    lambda x: ([True] * 20 + [False] * 20)[x.shape[-1]],
    lambda x: x.size() != torch.Size([2, 4, 32, 32]),
    lambda x: x.shape[-1] in range(20),
    lambda x: x.shape[0] > 0 and 0.5 * x.shape[-1] < 10,
]
LARGE = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("number", range(len(BEYOND)))
@pytest.mark.parametrize("kind", [branching, flagged])
def test_a_flag_whose_source_cannot_be_followed_is_skipped(kind, number):
    torch.manual_seed(0)
    model = trained(kind(BEYOND[number])(), IMAGE)
    result = torchfuse.fuse(model, IMAGE, verify=False)
    assert result.plan.fusions == ()
    assert torch.equal(result.model(LARGE), model(LARGE))


class HandsOn(nn.Module):
    """A flag that comes through several callers, and starred arguments, from a constant."""

    def __init__(self, outer):
        super().__init__()
        self.block, self.outer = Block(), outer

    def forward(self, x):
        return self.between(x, norm=self.outer(x))

    def between(self, *args, **kwargs):
        y = self.block(*args, **kwargs)
        return F.relu(y) if y.shape[-1] > 4 else y


class Constant(HandsOn):
    def __init__(self):
        super().__init__(None)

    def forward(self, x):
        return self.between(x, norm=True)


class Unpacked(HandsOn):
    def forward(self, x):
        flags = {"norm": self.outer(x)}
        return self.block(x, **flags)


class Returned(HandsOn):
    def forward(self, x):
        norm, _ = self.outer(x), x.shape
        return self.block(x, norm)


def test_a_flag_is_followed_to_the_callers_that_hand_it_on():
    torch.manual_seed(0)
    assert_fuses(trained(Constant(), IMAGE), IMAGE, others=(LARGE,))
    for handing_on in (HandsOn, Unpacked, Returned):
        model = trained(handing_on(lambda x: 0.5 * x.shape[-1] < 10), IMAGE)
        assert torchfuse.plan(model, IMAGE).fusions == ()


SMALL = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("number", range(len(CONDITIONS)))
@pytest.mark.parametrize("kind", [branching, flagged])
def test_a_branch_on_a_size_is_skipped(kind, number):
    torch.manual_seed(0)
    model = trained(kind(CONDITIONS[number])(), IMAGE)
    result = torchfuse.fuse(model, IMAGE, verify=False)
    assert result.plan.fusions == ()
    assert torch.equal(result.model(SMALL), model(SMALL))


class FromASlice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)])

    def forward(self, x):
        for layer in self.layers[: x.shape[-1] // 4]:
            x = layer(x)
        return x


class Suppressing(ConvBn):
    def forward(self, x):
        y = self.conv(x)
        with contextlib.suppress(RuntimeError):
            y = self.bn(y.view(2, 4, 8, 8))
        return y


class OnlyLater(ConvBn):
    """A false answer ends in an error: nothing is known of that way."""

    def forward(self, x):
        if x.shape[-1] >= 16:
            return self.conv(x.view(2, 4, -1, x.shape[-1] // 16, 16).mean(3))
        return self.bn(self.conv(x))


class ChecksThere(ConvBn):
    """The false answer ends in a check of what the true one would have made sure of."""

    def forward(self, x):
        if x.shape[-1] > 16:
            if x.shape[-1] % 16:
                raise ValueError("Large images must be multiples of 16.")
            return self.conv(x)
        return self.bn(self.conv(x))


class FailsSmall(ConvBn):
    """Neither the smaller inputs nor the false answer get through the other way."""

    def forward(self, x):
        if x.shape[-1] % 8 == 0:
            return self.bn(self.conv(x))
        return self.conv(x.view(x.shape[0], 4, x.shape[-1] // 6 * 6, x.shape[-1]))


class AsksForTheDtype(ConvBn):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if x.dtype is torch.float32 and x.shape[0] > 0 else y


@pytest.mark.parametrize(
    "model", [FromASlice, Suppressing, OnlyLater, ChecksThere, FailsSmall, AsksForTheDtype]
)
def test_paths_that_cannot_be_followed_are_skipped(model):
    torch.manual_seed(0)
    model = trained(model(), IMAGE)
    assert torchfuse.plan(model, IMAGE).fusions == ()


class OfferedRaw(ConvBn):
    def features(self, x, raw=False):
        y = self.conv(x)
        return y if raw else self.bn(y)


class OfferedToADepth(ConvBn):
    def features(self, x, depth=2):
        for layer in [self.conv, self.bn][:depth]:
            x = layer(x)
        return x


class OfferedByName(ConvBn):
    def features(self, x, names=()):
        for name in names:
            x = getattr(self, name)(x)
        x = self.conv(x)
        return self.bn(x)


class OfferedMasked(ConvBn):
    def features(self, x, mask=None):
        y = self.conv(x)
        if mask is not None:
            y = y * mask
        return self.bn(y)


class OfferedBySize(ConvBn):
    def features(self, x):
        y = self.conv(x)
        return self.bn(y) if 0.5 * x.shape[-1] < 10 else y


class HandsOutTheLayer(ConvBn):
    def features(self):
        return nn.Sequential(self.conv)


class HandsOutAProperty(ConvBn):
    @property
    def features(self):
        return self.conv


class HandsOutAList(ConvBn):
    def features(self):
        return [self.conv, self.bn]


class HandsOutByName(ConvBn):
    def features(self, name="conv"):
        return {"conv": self.conv, "bn": self.bn}[name]


@pytest.mark.parametrize(
    "model",
    [
        *(OfferedRaw, OfferedToADepth, OfferedByName, OfferedMasked, OfferedBySize),
        *(HandsOutTheLayer, HandsOutAProperty, HandsOutAList, HandsOutByName),
    ],
)
def test_a_method_that_may_be_called_otherwise_or_hands_the_layer_out_is_skipped(model):
    torch.manual_seed(0)
    assert_skipped(trained(model(), IMAGE), IMAGE, because="features")


class Exports(ConvBn):
    """What is called with inputs of forward just to see what it does may have other effects."""

    calls: ClassVar = []

    def write_features(self, x):
        self.calls.append(x)
        torch.save(self.conv(x), "features.pt")


def test_a_method_that_writes_files_is_not_tried_out():
    torch.manual_seed(0)
    assert_skipped(trained(Exports(), IMAGE), IMAGE, because="write_features")
    assert Exports.calls == []


class Logs(ConvBn):
    """Writes a line at each call, and a file on a way that no call here takes."""

    def __init__(self, folder):
        super().__init__()
        self.folder = str(folder)

    def forward(self, x):
        with open(f"{self.folder}/calls.txt", "a") as file:
            file.write("called\n")
        if x.shape[-1] > 16:
            torch.save(x, f"{self.folder}/large.pt")
        return self.bn(self.conv(x))


def test_what_is_only_explored_writes_no_files(tmp_path):
    # (Called by its own name: the benchmark of verdicts runs again what torchfuse.plan is given.)
    plan = torchfuse.fusing.model_fusing.plan(Logs(tmp_path).eval(), IMAGE)
    assert [path.name for path in tmp_path.iterdir()] == ["calls.txt"]
    assert (tmp_path / "calls.txt").read_text() == "called\n"  # by the recorded run alone
    assert len(plan.fusions) == 1
    assert any("when it runs again" in sentence for sentence in plan.scope)


class SetsUpByName(ConvBn):
    def reset_and_score(self, x):
        return self.conv(x)


class Scoring(ConvBn):
    def features(self, x):
        y = self.conv(x)
        return y, self.bn(y)


class PicksByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = ConvBn()

    def forward(self, x):
        return self.block(x)

    def pick(self, x, name="conv"):
        return getattr(self.block, name)(x)


@pytest.mark.parametrize(
    ("model", "method"),
    [(SetsUpByName, "reset_and_score"), (Scoring, "features"), (PicksByName, "pick")],
)
def test_a_public_method_that_tells_them_apart_is_evidence(model, method):
    torch.manual_seed(0)
    model = trained(model(), IMAGE)
    assert_skipped(model, IMAGE, because=method, methods=(method,))


class ByStage(ConvBn):
    def forward(self, x):
        return F.relu(self.stages(x))

    def stages(self, x, stage="bn"):
        y = self.conv(x)
        if stage == "conv":
            return y
        return self.bn(y)


class ByFlag(ConvBn):
    def forward(self, x):
        return self._go(x, True)

    def _go(self, x, whole):
        y = self.conv(x)
        return self.bn(y) if whole else y

    def raw(self, x):
        return self._go(x, False)


@pytest.mark.parametrize(("model", "method"), [(ByStage, "stages"), (ByFlag, "_go")])
def test_a_method_that_others_may_ask_for_less_is_skipped(model, method):
    torch.manual_seed(0)
    model = trained(model(), IMAGE)
    plan = torchfuse.plan(model, IMAGE)
    assert plan.fusions == ()
    assert method in plan.skips[0].reason


class WithSlots:
    __slots__ = ("layer",)

    def __init__(self, layer):
        self.layer = layer


@pytest.mark.parametrize(
    "hold",
    [
        weakref.ref,
        WithSlots,
        lambda conv: collections.deque([conv]),
        lambda conv: collections.UserList([WithSlots(conv)]),
    ],
)
def test_a_layer_that_any_object_holds_is_skipped(hold):
    torch.manual_seed(0)
    model = trained(ConvBn(), IMAGE)
    model.kept = hold(model.conv)
    plan = torchfuse.plan(model, IMAGE)
    assert plan.fusions == ()
    assert "held by the plain attribute `kept`" in plan.skips[0].reason


class CountsNorms(ConvBn):
    def forward(self, x):
        count = sum("BatchNorm" in type(module).__name__ for module in self.modules())
        return self.bn(self.conv(x)) * count


def test_code_that_asks_for_classes_by_name_is_skipped():
    torch.manual_seed(0)
    assert_skipped(trained(CountsNorms(), IMAGE), IMAGE, because="the class BatchNorm")


class Ticking:
    def __init__(self):
        self.count = 0

    def tick(self):
        self.count += 1
        return self.count


class Tiring(ConvBn):
    """A plain object counts the calls, in code that calls nothing of torch."""

    def __init__(self):
        super().__init__()
        self.clock = Ticking()

    def forward(self, x):
        self.clock.tick()
        y = self.conv(x)
        return self.bn(y) if self.clock.count < 20 else y


def test_a_branch_on_the_state_of_a_plain_object_is_skipped():
    torch.manual_seed(0)
    model = trained(Tiring(), IMAGE)
    plan = torchfuse.plan(model, IMAGE)
    assert plan.fusions == ()
    assert "`count` may be another at the next call" in plan.skips[0].reason


class Penalised(ConvBn):
    def penalty(self):
        return sum(parameter.square().sum() for parameter in self.parameters())


def test_what_reads_all_weights_at_once_is_named_in_the_scope():
    torch.manual_seed(0)
    result = assert_fuses(trained(Penalised(), IMAGE), IMAGE)
    assert any("finds the folded ones: penalty" in sentence for sentence in result.plan.scope)


class LosesASize(ConvBn):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y) if int(x.shape[-1]) > 4 else y


class Keeps(ConvBn):
    """Keeps a tensor of the last call, and goes another way than where there was none."""

    kept = None

    def forward(self, x):
        y = self.bn(self.conv(x))
        z = y if self.kept is None else F.relu(y)
        self.kept = y
        return z


class KeepsForTheConv(ConvBn):
    kept = None

    def forward(self, x):
        y = self.conv(x)
        z = self.bn(y) if self.kept is None else y
        self.kept = z
        return z


def test_a_tensor_that_is_kept_is_the_state_of_the_next_call():
    torch.manual_seed(0)
    keeps = ConvBn.eval(Keeps())
    assert len(torchfuse.plan(keeps, IMAGE).fusions) == 1
    assert torchfuse.plan(keeps, IMAGE, strict=True).fusions != ()
    plan = torchfuse.plan(ConvBn.eval(KeepsForTheConv()), IMAGE)
    assert plan.fusions == ()
    assert "On the next call of forward" in plan.skips[0].reason


class Clips(nn.Module):
    """Lets through what it is given, or not, as somebody told it that nobody heard."""

    def forward(self, y):
        return F.relu(y) if SEEN["size"] > 20 else y


SEEN = {"size": 0}


class ToldByANumber(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), between, nn.BatchNorm2d(4))

    def forward(self, x):
        SEEN["size"] = math.ceil(math.sqrt(x.shape[-1]) ** 2)
        return self.layers(x)


def test_a_module_in_between_that_branches_on_what_was_lost_is_seen():
    torch.manual_seed(0)
    model = trained(ToldByANumber(Clips()), IMAGE)
    SEEN["size"] = 0
    assert torchfuse.plan(model, IMAGE).fusions == ()
    assert SEEN["size"] == 0  # a global is put back like an attribute
    plain = trained(ToldByANumber(nn.Dropout(0.5)), IMAGE)
    assert len(torchfuse.plan(plain, IMAGE).fusions) == 1


def test_strict_skips_what_could_not_be_followed_and_the_scope_says_where():
    torch.manual_seed(0)
    model = trained(LosesASize(), IMAGE)
    plan = torchfuse.plan(model, IMAGE)
    assert len(plan.fusions) == 1
    assert any("plain number (test_other_paths.py:" in sentence for sentence in plan.scope)
    strict = torchfuse.plan(model, IMAGE, strict=True)
    assert strict.fusions == ()
    assert "could be followed" in strict.skips[0].reason
    assert torchfuse.fuse(model, IMAGE, strict=True).plan.fusions == ()
