"""What a function branches on: configuration is one way, what may change between calls is not."""

import pytest
import torch

from torchfuse.judging.branching import branching_of
from torchfuse.judging.sources import ANY_NAME

VOLATILE = frozenset({"calls"})
GLOBAL = True


class Functions:
    """Never run: only their source counts."""

    def straight(self, x):
        return self.bn(self.conv(x))

    def by_configuration(self, x):
        return self.bn(x) if self.use_norm and not self.deploy else x

    def by_a_global(self, x):
        return self.bn(x) if GLOBAL else x

    def by_an_argument_that_is_given(self, x, mask=None):
        return x if mask is None else x * mask

    def over_its_own_layers(self, x):
        for index, layer in enumerate(self.layers):
            x = layer(x) + self.offsets[index]
        return x

    def raising(self, x):
        if x.dim() != 4:
            raise ValueError("four dimensions expected")
        assert len(x) > 0
        return self.bn(x)

    def by_shape(self, x):
        return self.bn(x) if x.shape[0] > 2 else x

    def by_length_of_input(self, input):  # noqa: A002  # as torch's own modules name it
        return self.bn(input) if len(input) > 2 else input

    def by_a_local(self, x):
        large = x.shape[0] > 2
        return x if large else self.bn(x)

    def by_a_flag_argument(self, x, skip):
        return x if skip else self.bn(x)

    def by_state(self, x):
        return self.bn(x) if self.calls < 3 else x

    def by_a_random_number(self, x):
        return self.bn(x) if torch.rand(()) < 0.5 else x

    def as_often_as_told(self, x, times):
        for _ in range(times):
            x = self.bn(x)
        return x

    def picked_by_value(self, x):
        return self.norms[int(x.mean())](x)

    def catching(self, x):
        try:
            return self.bn(x)
        except RuntimeError:
            return x

    def in_a_nested_function(self, x):
        def normed(y):
            return self.bn(y) if y.shape[0] > 2 else y

        return normed(x)


ONE_WAY = [
    *("straight", "by_configuration", "by_a_global", "by_an_argument_that_is_given"),
    *("over_its_own_layers", "raising"),
]
OTHER_WAYS = sorted(
    name for name in vars(Functions) if not name.startswith("__") and name not in ONE_WAY
)


@pytest.mark.parametrize("name", ONE_WAY)
def test_one_way_for_every_input(name):
    assert branching_of(getattr(Functions, name).__code__, VOLATILE).one_way


@pytest.mark.parametrize("name", OTHER_WAYS)
def test_other_ways_for_other_inputs_or_calls(name):
    assert not branching_of(getattr(Functions, name).__code__, VOLATILE).one_way


def test_it_says_what_it_catches_and_what_is_restless():
    assert branching_of(Functions.catching.__code__, VOLATILE).catches
    assert branching_of(Functions.by_state.__code__, VOLATILE).restless == "calls"
    assert branching_of(Functions.by_a_random_number.__code__, VOLATILE).restless == "rand"


def test_where_any_attribute_may_have_been_set_none_is_configuration():
    code = Functions.by_configuration.__code__
    assert not branching_of(code, frozenset({ANY_NAME})).one_way


def test_code_without_source_may_take_any_way():
    space = {}
    exec("def made(self, x): return x", space)
    assert not branching_of(space["made"].__code__, VOLATILE).one_way
