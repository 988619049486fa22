"""One module called right on the other's output, with no way around it: read off the bytecode."""

import sys

import pytest

from torchfuse.conditions.straight import (
    branches,
    branches_on_an_argument,
    is_straight,
    picks,
    results_of,
    stand_side_by_side,
)


class Model:
    """Notes where in a method it is called."""

    def __init__(self):
        self.places = {}

    def conv(self, x):
        self.places.setdefault("conv", sys._getframe(1).f_lasti)
        return x

    def bn(self, x):
        self.places["bn"] = sys._getframe(1).f_lasti
        return x


class Direct(Model):
    """Each calls conv, then bn on what it made, whatever else happens."""

    def nested(self, x):
        return self.bn(self.conv(x))

    def one_after_the_other(self, x):
        y = self.conv(x)
        y = self.bn(y)
        return y + 1 if x > 2 else y

    def into_another_name(self, x):
        y = self.conv(x)
        z = self.bn(y)
        return z if x > 0 else z * 2

    def through_another(self, x):
        x = self.conv(x)
        x = abs(self.bn(x))
        return x if x > 2 else x + 1

    def moved_on_the_way(self, x):
        return self.bn(self.conv(x))


class NotDirect(Model):
    """On another way than this one, something else may be done with what conv made."""

    def on_one_side(self, x):
        y = self.conv(x)
        return self.bn(y) if x > 0 else y

    def used_later(self, x):
        y = self.conv(x)
        z = self.bn(y)
        return z + y if x > 0 else z

    def read_with_it(self, x):
        y = self.conv(x)
        y = max(self.bn(y), y)
        return y if x > 0 else y + 1

    def kept_beside(self, x):
        y = self.conv(x)
        return [y, self.bn(y)][x > 0]

    def in_a_loop(self, x):
        for layer in (self.conv, self.bn)[: x + 1]:
            x = layer(x)
        return x


def straight(class_, name):
    model = class_()
    getattr(model, name)(1)
    code = getattr(class_, name).__code__
    return is_straight(code, model.places["conv"], model.places["bn"])


@pytest.mark.parametrize("name", [n for n in vars(Direct) if n[0] != "_"])
def test_what_follows_in_a_straight_line_is_straight(name):
    assert straight(Direct, name)


@pytest.mark.parametrize("name", [n for n in vars(NotDirect) if n[0] != "_"])
def test_what_may_go_another_way_is_not(name):
    assert not straight(NotDirect, name)


class Methods:
    """Never run."""

    def picks(self, x, index):
        return self.norms[index](x)

    def takes_the_first(self, x):
        return self.norms[0](x)

    def asks_for_an_argument(self, x, stage="bn"):
        y = self.conv(x)
        return y if stage == "conv" else self.bn(y)

    def asks_for_itself(self, x):
        return self.bn(x) if self.norm else x

    def makes_a_sequence(self):
        return Sequential(self.conv, self.bn)  # noqa: F821

    def has_something_between(self):
        return Sequential(self.conv, self.act, self.bn)  # noqa: F821

    def gives_itself_back(self):
        self.conv = self.conv.fused
        return self

    def gives_a_layer_back(self):
        return self.conv

    def yields(self):
        yield self


def methods_that(holds):
    return {n for n, f in vars(Methods).items() if n[0] != "_" and holds(f.__code__)}


def test_a_function_branches_with_a_jump_and_picks_by_an_index():
    assert methods_that(branches) == {"asks_for_an_argument", "asks_for_itself"}
    assert methods_that(lambda code: picks(code, frozenset({"norms"}))) == {"picks"}
    assert methods_that(lambda code: picks(code, frozenset({"others"}))) == set()
    assert methods_that(branches_on_an_argument) == {"asks_for_an_argument"}


def test_two_attributes_stand_side_by_side():
    found = methods_that(lambda code: stand_side_by_side(code, "conv", "bn"))
    assert found == {"asks_for_an_argument", "makes_a_sequence"}


def test_what_a_function_gives_back_is_itself_or_nothing():
    assert results_of(Methods.gives_itself_back.__code__) == {"self"}
    assert results_of((lambda: None).__code__) == {None}
    assert results_of(Methods.gives_a_layer_back.__code__) is None
    assert results_of(Methods.yields.__code__) is None
