"""Ways through the code of a model that the recorded run did not take."""

import itertools
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchfuse
from support.fusing_checks import IMAGE, ConvBn, assert_fuses, assert_skipped, trained
from torchfuse.cases import Case


class LooksAtSizes(ConvBn):
    """Its forward reads a shape and a value, so that branches count."""

    flag = True

    def look(self, x):
        return x.shape[-1], x.sum().item()


class Nested(LooksAtSizes):
    def forward(self, x):
        size, _ = self.look(x)
        y = self.bn(self.conv(x))
        return y if size > 4 else F.relu(y)


class OneAfterTheOther(LooksAtSizes):
    def forward(self, x):
        size, _ = self.look(x)
        y = self.conv(x)
        y = self.bn(y)
        if size > 4:
            y = F.relu(y)
        return y


class OnConfiguration(LooksAtSizes):
    def forward(self, x):
        self.look(x)
        y = self.conv(x)
        if self.flag and self.bn is not None:
            y = self.bn(y)
        return y


class Guarded(LooksAtSizes):
    def forward(self, x):
        size, value = self.look(x)
        if size < 1 or value != value:
            raise ValueError("no")
        y = self.conv(x)
        assert y.dim() == 4
        return self.bn(y)


class InSequential(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        y = self.stem(x)
        return y if x.mean() > 0 else -y


class InALoopOverItsOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 1)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4)])

    def forward(self, x):
        x.sum().item()
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = conv(x)
            x = norm(y)
        return x


@pytest.mark.parametrize(
    "model", [Nested, OneAfterTheOther, OnConfiguration, Guarded, InSequential, InALoopOverItsOwn]
)
def test_code_that_has_only_one_way_from_conv_to_norm_is_fused(model):
    torch.manual_seed(0)
    assert_fuses(trained(model(), IMAGE), IMAGE)


class ReadLater(LooksAtSizes):
    def forward(self, x):
        size, _ = self.look(x)
        y = self.conv(x)
        z = self.bn(y)
        return z if size > 4 else y


class NotOnEverySide(LooksAtSizes):
    def forward(self, x):
        size, _ = self.look(x)
        y = self.conv(x)
        return self.bn(y) if size > 4 else y


def norm_if(model, y, x):
    return model.bn(y) if x.sum() > -1e9 else y


class InAHelper(ConvBn):
    def forward(self, x):
        return norm_if(self, self.conv(x), x)


class Catching(ConvBn):
    def forward(self, x):
        y = self.conv(x)
        try:
            return self.bn(y.view(2, 4, 8, 8))
        except RuntimeError:
            return y


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ReadLater, "the code takes another path"),
        (NotOnEverySide, "the code takes another path"),
        (
            InAHelper,
            r"another answer at test_execution_paths.*\.py:\d+, the code takes another path",
        ),
        (Catching, "the code takes another path"),
    ],
)
def test_code_with_another_way_is_skipped_and_says_where(model, reason):
    torch.manual_seed(0)
    assert_skipped(trained(model(), IMAGE), IMAGE, because=reason)


class Counting(ConvBn):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.conv(x)
        return y if self.calls > 2 else self.bn(y)


class CountingInAList(ConvBn):
    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        y = self.conv(x)
        return y if len(self.calls) > 2 else self.bn(y)


class CountingInADict(ConvBn):
    def __init__(self):
        super().__init__()
        self.counts = {"calls": 0}

    def forward(self, x):
        self.counts["calls"] += 1
        y = self.conv(x)
        return y if self.counts["calls"] > 2 else self.bn(y)


class Alternating(ConvBn):
    def __init__(self):
        super().__init__()
        self.turns = itertools.cycle([True, False])

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if next(self.turns) else y


class ThroughAProperty(ConvBn):
    @property
    def learning(self):
        return torch.is_grad_enabled()

    def forward(self, x):
        y = self.conv(x)
        return y if self.learning else self.bn(y)


class FlaggedByAHook(ConvBn):
    def __init__(self):
        super().__init__()
        self.large = False
        self.register_forward_pre_hook(note_size)

    def forward(self, x):
        y = self.conv(x)
        return y if self.large else self.bn(y)


def note_size(module, args):
    module.large = args[0].shape[0] > 8


class SetByName(ConvBn):
    def __init__(self):
        super().__init__()
        self.large = False

    def forward(self, x):
        setattr(self, "large", x.shape[0] > 8)  # noqa: B010  # it is about setattr
        return self._normed(self.conv(x))

    def _normed(self, y):
        return y if self.large else self.bn(y)


class SetInTheTable(SetByName):
    def forward(self, x):
        vars(self).update(large=x.shape[0] > 8)
        return self._normed(self.conv(x))


CALLS = []


class CountingInAGlobal(ConvBn):
    def forward(self, x):
        CALLS.append(1)
        y = self.conv(x)
        return y if len(CALLS) > 99 else self.bn(y)


class PickedFromAList(ConvBn):
    def forward(self, x):
        y = self.conv(x)
        return [y, self.bn(y)][x.shape[0] < 9]


class AsksForGradients(ConvBn):
    def forward(self, x):
        y = self.conv(x)
        return (self.bn(y), y) if torch.is_grad_enabled() else self.bn(y)


def clipped_if_large(y, x):
    return F.relu(y) if x.shape[0] > 8 else y


class ThroughAHelper(ConvBn):
    def forward(self, x):
        return self.bn(clipped_if_large(self.conv(x), x))


class MaybeClipped(nn.Module):
    def forward(self, y):
        return F.relu(y) if y.shape[-1] > 16 else y


class ThroughAModule(ConvBn):
    def __init__(self):
        super().__init__()
        self.maybe = MaybeClipped()

    def forward(self, x):
        return self.bn(self.maybe(self.conv(x)))


class PerDomain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

    def forward(self, x):
        return self.norms[int(x.mean() > 1e9)](self.conv(x))


class AsOftenAsSaid(ConvBn):
    def forward(self, x):
        y = self.conv(x)
        for _ in range(int(x.abs().max() < 1e9)):
            y = self.bn(y)
        return y


class AsksForLength(ConvBn):
    def forward(self, x):
        y = self.conv(x)
        return y if len(x) > 99 else self.bn(y)


class AsksForRank(ConvBn):
    def forward(self, x):
        y = self.conv(x)
        return y if x.dim() == 3 else self.bn(y)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Counting(), "`calls` may be another at the next call"),
        (CountingInAList(), "not every path could be followed"),
        (CountingInADict(), "`calls` may be another at the next call"),
        (Alternating(), "another"),
        (ThroughAProperty(), "another answer at"),
        (FlaggedByAHook(), "another answer at"),
        (SetByName(), "another answer at"),
        (SetInTheTable(), "another answer at"),
        (CountingInAGlobal(), "`CALLS` may be another at the next call"),
        (PickedFromAList(), "another"),
        (AsksForGradients(), "another answer at"),
        (ThroughAHelper(), "another"),
        (ThroughAModule(), "another"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), MaybeClipped(), nn.BatchNorm2d(4)), "another answer at"),
        (PerDomain(), "not every path could be followed: a"),
        (AsOftenAsSaid(), "not every path could be followed: a"),
        (AsksForLength(), "not every path could be followed: a"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_conditions_alone_see_what_another_call_could_do(model, reason):
    plan = torchfuse.plan(model.eval(), IMAGE)
    assert plan.fusions == ()
    assert any(reason in skip.reason for skip in plan.skips), plan.skips


@lru_cache
def half(sizes):
    return sizes[-1] // 2


def cached(sizes):
    """By a cache, and without it where a size has no hash, as einops does for symbolic sizes."""
    try:
        return half(sizes)
    except TypeError:
        return half.__wrapped__(sizes)


class BesideACache(ConvBn):
    def __init__(self, halved):
        super().__init__()
        self.halved = halved
        self.settings = {"norm": True}

    def forward(self, x):
        y = self.conv(x[..., : self.halved(tuple(x.shape))])
        return self.bn(y) if self.settings["norm"] else y


def test_a_cache_that_is_gone_past_where_sizes_have_no_hash_loses_nothing():
    assert_fuses(trained(BesideACache(cached), IMAGE), IMAGE)
    assert_skipped(trained(BesideACache(half), IMAGE), IMAGE, "looked up by its hash")


def test_the_number_of_dimensions_is_part_of_the_scope():
    assert_fuses(trained(AsksForRank(), IMAGE), IMAGE)
    assert "the same numbers of dimensions" in torchfuse.plan(AsksForRank().eval(), IMAGE).scope[0]


class Checkpoints(ConvBn):
    with_cp = False

    def forward(self, x):
        def inner(x):
            return self.bn(self.conv(x))

        if self.with_cp and x.requires_grad:
            return torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)
        return inner(x)


def test_a_branch_on_gradients_behind_a_flag_that_is_off_is_none():
    assert_fuses(trained(Checkpoints(), IMAGE), IMAGE)


class AsksForGradientsOfTheInput(ConvBn):
    def forward(self, x):
        y = self.conv(x)
        return y if x.requires_grad else self.bn(y)


def test_a_branch_on_gradients_of_the_input_is_one():
    model = AsksForGradientsOfTheInput().eval()
    assert_skipped(trained(model, IMAGE), IMAGE, because="another answer at")


class Direct(ConvBn):
    def encode(self, x):
        return self.bn(self.conv(x)).mean((2, 3))


class Setup(ConvBn):
    def init_weights(self):
        nn.init.zeros_(self.bn.weight)

    def freeze(self):
        for parameter in self.conv.parameters():
            parameter.requires_grad_(False)
        for module in self.modules():
            module.eval()


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = ConvBn()

    def forward(self, x):
        return self.block(x)

    def features(self, x):
        return [self.block(x)]

    @property
    def dtype(self):
        return self.block.conv.weight.dtype


def in_pairs(model, names):
    for name in names:
        getattr(model, name).requires_grad_(False)


class FusesItself(ConvBn):
    """As the models of torchvision that are made to be quantized."""

    def fuse_model(self, is_qat=None):
        in_pairs(self, ["conv", "bn"])


def weighed(model, names):
    return [getattr(model, name).weight for name in names]


class GivesItsWeights(ConvBn):
    def weights(self, squared=False):
        return weighed(self, ["conv", "bn"])


@pytest.mark.parametrize("model", [Direct, Setup, Whole, FusesItself])
def test_methods_that_do_not_separate_the_two_are_no_obstacle(model):
    torch.manual_seed(0)
    assert_fuses(trained(model(), IMAGE), IMAGE)


class ReturnsTheConv(ConvBn):
    def hidden(self, x):
        return self.conv(x)


class NormAlone(ConvBn):
    def normed(self, x):
        return self.bn(x)


class ReadsTheWeight(ConvBn):
    def penalty(self):
        return self.conv.weight.square().sum()


class Decorated(ConvBn):
    @torch.no_grad()
    def features(self, x):
        return self.conv(x)


class ThroughSuper(ReturnsTheConv):
    def hidden(self, x):
        return super().hidden(x) + 1


class NotASetup(ConvBn):
    def initial(self, x):
        return self.conv(x)


def stem_of(model, x):
    return model.conv(x)


class ThroughAFunction(ConvBn):
    def features(self, x):
        return stem_of(self, x)


class RanAsAHelper(ConvBn):
    def features(self, x):
        return self.conv(x)

    def forward(self, x):
        return self.bn(self.features(x))


class ByIndex(nn.Sequential):
    def stem(self, x):
        return self[0](x)


class Tapping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.layers(x)

    def taps(self, x):
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return outputs


@pytest.mark.parametrize(
    ("model", "method"),
    [
        (ReturnsTheConv(), "hidden"),
        (NormAlone(), "normed"),
        (ReadsTheWeight(), "penalty"),
        (GivesItsWeights(), "weights"),
        (ByIndex(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), "stem"),
        (Tapping(), "taps"),
        (Decorated(), "features"),
        (ThroughSuper(), "hidden"),
        (NotASetup(), "initial"),
        (ThroughAFunction(), "features"),
        (RanAsAHelper(), "features"),
    ],
)
def test_methods_that_separate_the_two_are_named(model, method):
    assert_skipped(trained(model, IMAGE), IMAGE, because=rf"\.{method}, .* uses `.*` on its own")


def test_a_recorded_method_speaks_for_itself():
    class Model(ConvBn):
        def encode(self, x, scale):
            y = self.conv(x)
            if self.training:
                return y
            return self.bn(y).mean() * scale

    torch.manual_seed(0)
    model = trained(Model(), IMAGE)
    assert torchfuse.plan(model, IMAGE).fusions == ()
    cases = [Case((IMAGE,)), Case((IMAGE, 2.0), method="encode")]
    result = torchfuse.fuse(model, cases)
    assert len(result.plan.fusions) == 1
    assert result.check.passed


class AsksForChannels(ConvBn):
    def forward(self, x):
        return self.bn(self.conv(x)) * self.bn.num_features


class AsksForTheBias(ConvBn):
    def __init__(self):
        super().__init__(nn.Conv2d(4, 4, 3, bias=False))

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y if self.conv.bias is None else y - 1


class AsksForTheClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.BatchNorm2d):
                x = F.relu(x)
        return x


@pytest.mark.parametrize(
    ("model", "asked"),
    [
        (AsksForChannels, "`bn.num_features`"),
        (AsksForTheBias, "`conv.bias`"),
        (AsksForTheClass, "the class BatchNorm2d"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_code_that_asks_for_what_folding_changes_is_skipped(model, asked, verify):
    torch.manual_seed(0)
    model = trained(model(), IMAGE)
    result = torchfuse.fuse(model, IMAGE, verify=verify)
    assert f"asks for {asked}" in result.plan.skips[0].reason
    assert torch.equal(result.model(IMAGE), model(IMAGE))
