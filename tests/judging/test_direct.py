"""One module called right on the other's output, with no way around it."""

import pytest

from torchfuse.judging.direct import is_direct


class Direct:
    """Never run: only their source counts."""

    def nested(self, x):
        return self.bn(self.conv(x)).relu()

    def one_after_the_other(self, x):
        y = self.conv(x)
        y = self.bn(y)
        return y + 1 if x.shape[0] > 2 else y

    def into_another_name(self, x):
        y = self.conv(x)
        z = self.bn(y)
        return z if x.mean() > 0 else z * 2

    def moved_on_the_way(self, x):
        return self.bn(self.conv(x).flatten(0, 1))


class NotDirect:
    """Likewise."""

    def on_one_side(self, x):
        y = self.conv(x)
        return self.bn(y) if x.mean() > 0 else y

    def used_later(self, x):
        y = self.conv(x)
        z = self.bn(y)
        return z + y if x.mean() > 0 else z

    def kept_beside(self, x):
        y = self.conv(x)
        return [y, self.bn(y)][int(x.mean() > 0)]

    def called_twice(self, x):
        z = self.bn(self.conv(x))
        return z + self.conv(x) if x.mean() > 0 else z

    def something_between(self, x):
        y = self.conv(x)
        y = y.relu()
        return self.bn(y)

    def another_argument(self, x):
        return self.bn(self.relu(self.conv(x)))


@pytest.mark.parametrize("name", [n for n in vars(Direct) if n[0] != "_"])
def test_direct(name):
    assert is_direct(getattr(Direct, name).__code__, "conv", "bn")


@pytest.mark.parametrize("name", [n for n in vars(NotDirect) if n[0] != "_"])
def test_not_direct(name):
    assert not is_direct(getattr(NotDirect, name).__code__, "conv", "bn")


def test_what_has_no_source_is_not_known_to_be_direct():
    assert not is_direct(None, "conv", "bn")
    assert not is_direct(compile("0", "<text>", "eval"), "conv", "bn")
