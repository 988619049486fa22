"""A branch on what no call changes comes out the same at every call, whatever exploring lost."""

import types

import pytest
import torch.nn.functional as F
from torch import nn

from support.fusing_checks import IMAGE, ConvBn, assert_fuses, assert_skipped, trained


def plain_size(x):
    """A size that is lost: exploring follows no plain number."""
    return int(x.shape[-1])


class Configured(ConvBn):
    """The norm stands behind a branch, in code that does more with the layer than to call it."""

    width = 8
    act = None

    def __init__(self):
        super().__init__()
        self.settings = types.SimpleNamespace(width=8)

    def padded(self, x, layer):
        return F.pad(x, (0, plain_size(x) % layer.stride[0]))

    def forward(self, x):
        y = self.conv(self.padded(x, self.conv))
        if self.asks():
            y = self.bn(y)
        return y

    def asks(self):
        return True


class IsThere(Configured):
    def forward(self, x):
        y = self.conv(self.padded(x, self.conv))
        if self.bn is not None:
            y = self.bn(y)
        if self.act is not None and self.width > 4:
            y = self.act(y)
        return y


class IsOfAClass(Configured):
    def forward(self, x):
        y = self.conv(self.padded(x, self.conv))
        if isinstance(self.bn, nn.Module) and self.settings.width == 8:
            y = self.bn(y)
        return y


class Repeats(Configured):
    def __init__(self):
        super().__init__()
        self.acts = nn.ModuleList([nn.ReLU(), nn.Tanh()])

    def forward(self, x):
        y = self.conv(self.padded(x, self.conv))
        if not self.training:
            y = self.bn(y)
        for act in self.acts:
            y = act(y)
        return y


@pytest.mark.parametrize("model", [IsThere, IsOfAClass, Repeats])
def test_a_branch_on_what_no_call_changes_is_the_same_on_every_way(model):
    assert_fuses(trained(model(), IMAGE), IMAGE)


class Getter(nn.ModuleDict):
    """Calls its layers in turn, and keeps some outputs, as torchvision's detectors do."""

    def __init__(self, layers, kept):
        super().__init__(layers)
        self.kept = kept

    def forward(self, x):
        found = {}
        for name, layer in self.items():
            x = layer(x)
            if name in self.kept:
                found[self.kept[name]] = x
        return found


class Backbone(nn.Module):
    def __init__(self, getter=Getter):
        super().__init__()
        norm = ConvBn()
        layers = {"conv": norm.conv, "bn": norm.bn, "act": nn.ReLU()}
        self.body = getter(layers, {"act": "features"})

    def forward(self, x, extra=None):
        y = self.body(F.pad(x, (0, plain_size(x) % 2)))["features"]
        return y if extra is None else y + extra


def test_a_container_that_calls_its_layers_in_turn_is_the_same_at_every_call():
    assert_fuses(trained(Backbone(), IMAGE), IMAGE)


class ForgetsSome(Getter):
    def forward(self, x):
        if plain_size(x) < 3:
            self.kept.pop("act")
        return super().forward(x)


class KeepsBySize(Getter):
    def forward(self, x):
        found = {}
        for name, layer in self.items():
            if name == "bn" and plain_size(x) < 3:
                break
            x = layer(x)
            if name in self.kept:
                found[self.kept[name]] = x
        return found


class DropsALayer(Getter):
    def forward(self, x):
        if plain_size(x) < 3:
            del self["bn"]
        return super().forward(x)


class ItsOwnItems(Getter):
    def items(self):
        return [(n, m) for n, m in super().items() if n != "bn" or self.wide]

    def forward(self, x):
        self.wide = plain_size(x) > 2
        return super().forward(x)


class DropsItsLayer(Backbone):
    def forward(self, x, extra=None):
        if plain_size(x) < 3:
            del self.body["bn"]
        return super().forward(x, extra)


class DropsItByAnotherName(Backbone):
    def forward(self, x, extra=None):
        body = self.body
        if plain_size(x) < 3:
            del body["bn"]
        return super().forward(x, extra)


class DropsItByAThirdName(Backbone):
    def forward(self, x, extra=None):
        body = self.body
        same = body
        if plain_size(x) < 3:
            same.__delitem__("bn")
        return super().forward(x, extra)


class DropsItByGetattr(Backbone):
    def forward(self, x, extra=None):
        if plain_size(x) < 3:
            del getattr(self, "bo" + "dy")["bn"]
        return super().forward(x, extra)


class DropsItFromAChild(Backbone):
    def forward(self, x, extra=None):
        if plain_size(x) < 3:
            for child in self.children():
                del child["bn"]
        return super().forward(x, extra)


def drop(layers, name):
    del layers[name]


class DropsItInAFunction(Backbone):
    def forward(self, x, extra=None):
        if plain_size(x) < 3:
            drop(self.body, "bn")
        return super().forward(x, extra)


class DropsItFromTheModel(Backbone):
    def forward(self, x, extra=None):
        if plain_size(x) < 3:
            drop(self, "body")
        return super().forward(x, extra)


class DropsItFromTheFirst(Backbone):
    def forward(self, x, extra=None):
        if plain_size(x) < 3:
            del next(iter(self.children()))["bn"]
        return super().forward(x, extra)


class DropsItFromAStage(Backbone):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([self.body])

    def forward(self, x, extra=None):
        if plain_size(x) < 3:
            self.stages[0].pop("bn")
        return super().forward(x, extra)


class Collects(Backbone):
    def forward(self, x, extra=None):
        found = {}
        collect(self.body, found, x)
        for name, child in self.named_children():
            found[name] = len(child)
            found.pop(name)
        return super().forward(x, extra)


def collect(layers, found, x):
    found["layers"] = len(layers) + x.shape[1]


class KeepsMore(Backbone):
    def forward(self, x, extra=None):
        kept = self.body(F.pad(x, (0, plain_size(x) % 2)))
        kept["pooled"] = kept["features"].mean()  # of what it returned, not of the container
        drop(kept, "unused") if "unused" in kept else None
        return kept["features"] + kept["pooled"]


@pytest.mark.parametrize("model", [KeepsMore, Collects])
def test_what_is_changed_beside_a_container_does_not_matter(model):
    assert_fuses(trained(model(), IMAGE), IMAGE)


@pytest.mark.parametrize(
    "model",
    [
        *(DropsItsLayer, DropsItByAnotherName, DropsItByAThirdName, DropsItByGetattr),
        *(DropsItFromAChild, DropsItInAFunction, DropsItFromTheModel, DropsItFromTheFirst),
        DropsItFromAStage,
    ],
)
def test_a_container_that_another_module_takes_a_layer_out_of_is_not(model):
    assert_skipped(trained(model(), IMAGE), IMAGE, "branches")


@pytest.mark.parametrize("getter", [ForgetsSome, KeepsBySize, DropsALayer, ItsOwnItems])
def test_a_container_whose_loop_may_come_out_otherwise_is_not(getter):
    assert_skipped(trained(Backbone(getter), IMAGE), IMAGE, "branches")


class WritesIt(IsThere):
    def padded(self, x, layer):
        self.width = 8 if plain_size(x) > 2 else 2
        return super().padded(x, layer)

    def forward(self, x):
        y = self.conv(self.padded(x, self.conv))
        if self.width > 4:
            y = self.bn(y)
        return y


class WritesItByName(WritesIt):
    def padded(self, x, layer):
        setattr(self, "wid" + "th", 8 if plain_size(x) > 2 else 2)
        return F.pad(x, (0, plain_size(x) % layer.stride[0]))


def note(settings, size):
    settings.width = 8 if size > 2 else 2


class WritesItInAFunction(Configured):
    def forward(self, x):
        note(self.settings, plain_size(x))
        y = self.conv(self.padded(x, self.conv))
        if self.settings.width > 4:
            y = self.bn(y)
        return y


class WritesItOnAnotherWay(Configured):
    def forward(self, x):
        if plain_size(x) < 3:
            self.narrow()
        y = self.conv(self.padded(x, self.conv))
        if self.width > 4:
            y = self.bn(y)
        return y

    def narrow(self):
        self.width = 2


class FillsIt(Configured):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        if plain_size(x) < 3:
            self.seen.append(x.shape)
        y = self.conv(self.padded(x, self.conv))
        if not self.seen:
            y = self.bn(y)
        return y


class ComputesIt(Configured):
    seen = 8

    @property
    def wide(self):
        return ComputesIt.seen > 4

    def forward(self, x):
        ComputesIt.seen = plain_size(x)
        y = self.conv(self.padded(x, self.conv))
        if self.wide:
            y = self.bn(y)
        return y


class AsksForALocal(Configured):
    def forward(self, x):
        wide = plain_size(x) > 4
        y = self.conv(self.padded(x, self.conv))
        if self.bn is not None and wide:
            y = self.bn(y)
        return y


class AsksForAnArgument(Configured):
    def forward(self, x):
        return self._both(x, plain_size(x) > 4)

    def _both(self, x, wide):
        y = self.conv(self.padded(x, self.conv))
        if wide:
            y = self.bn(y)
        return y


class AsksForAnother(Configured):
    def forward(self, x):
        y = self.conv(self.padded(x, self.conv))
        if plain_size(x) < 3:
            self = types.SimpleNamespace(bn=None)
        if self.bn is not None:
            y = self.bn(y)
        return y


class EndsALoop(Configured):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([self.bn])

    def forward(self, x):
        y = self.conv(self.padded(x, self.conv))
        for norm in self.norms:
            if plain_size(x) < 3:
                break
            y = norm(y)
        return y


@pytest.mark.parametrize(
    "model",
    [
        *(Configured, WritesIt, WritesItByName, WritesItInAFunction, WritesItOnAnotherWay),
        *(FillsIt, ComputesIt, AsksForALocal, AsksForAnArgument, AsksForAnother, EndsALoop),
    ],
)
def test_a_branch_on_what_a_call_may_write_is_not(model):
    assert_skipped(trained(model(), IMAGE), IMAGE, "not every path could be followed")
