"""What a method's source reaches below its module, as chains of names."""

import pytest

from torchfuse.conditions.mentions import BELOW, Mention, mentions_of


class Methods:
    """Never run: only their source counts."""

    def calls(self, x):
        return self.layers[0].conv(x)

    def reads(self, x):
        return self.conv.weight + x

    def compares(self, x):
        return x if self.conv is None else None

    def picks_any(self, x, i):
        return self.layers[i](x)

    def loops(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def loops_over_a_part(self, x):
        for layer in self.layers[1:]:
            x = layer(x)
        return x

    def asks_a_part(self):
        return sum(layer.size() for layer in self.layers[1:])

    def goes_into_a_part(self, x):
        for layer in self.layers[1:]:
            x = layer[0](x)
        return x

    def calls_a_part(self, x):
        return self.layers[1:](x)

    def searches(self, name, x):
        return dict(self.named_modules())[name](x)

    def takes_a_child(self, x):
        return next(self.children())(x)

    def by_constant_name(self, x):
        return getattr(self, "conv")(x)  # noqa: B009  # it is about getattr

    def hands_itself_on(self, x):
        return run(self, x)  # noqa: F821

    def is_unpacked(self, x):
        first, second = self
        return second(first(x))

    def is_renamed(self, x):
        model = self if x is not None else None
        return model.conv(x)

    def counts_modules(self):
        return len([m for m in self.modules() if m.training])

    def sums_weights(self):
        return sum(m.weight * m.weight for m in self.modules())

    def assigns(self, x):
        self.kept = x

    def asks_for_class(self):
        return isinstance(self.conv, int)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("calls", [(("layers", "0", "conv"), "called")]),
        ("reads", [(("conv", "weight"), "read")]),
        ("compares", [(("conv",), "compared")]),
        ("picks_any", [(("layers", None), "called")]),
        ("loops", [(("layers", None), "called")]),
        ("loops_over_a_part", [(("layers", None), "called")]),
        ("asks_a_part", [(("layers", None, "size"), "called")]),
        ("goes_into_a_part", [(("layers", None, None), "called")]),
        ("calls_a_part", [(("layers", None), "called")]),
        ("searches", [((BELOW,), "called")]),
        ("takes_a_child", [((None,), "called")]),
        ("by_constant_name", [(("conv",), "called")]),
        ("hands_itself_on", [((None,), "called")]),
        ("is_unpacked", [((None,), "called")]),
        ("is_renamed", [((), "read"), (("conv",), "called")]),
        ("counts_modules", []),
        ("sums_weights", [((BELOW,), "called")]),
        ("assigns", []),
        ("asks_for_class", []),
    ],
)
def test_a_method_mentions(method, expected):
    found = mentions_of(getattr(Methods, method))
    assert list(found) == [Mention(chain, usage) for chain, usage in expected]


def test_another_name_than_the_first_argument_can_own_what_is_mentioned():
    def stem(x, model):
        return model.conv(x + 1)

    assert mentions_of(stem) == (Mention((), "read"),)
    assert mentions_of(stem, "model") == (Mention(("conv",), "called"),)


def test_a_function_without_source_mentions_what_nobody_knows():
    space = {}
    exec("def made(self, x): return self.conv(x)", space)
    assert mentions_of(space["made"]) is None
    assert mentions_of(lambda self, x: self.conv(x)) is None
