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
