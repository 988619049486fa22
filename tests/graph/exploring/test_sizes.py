"""Numbers that tell when code compares them."""

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from torchfuse.graph.exploring.sizes import counted, followed, listening, plain


class Ear:
    """Answers truly, or each time otherwise, and remembers what it was told."""

    def __init__(self, lie=False):
        self.lie, self.asked, self.lost = lie, [], []

    def truth(self, real):
        self.asked.append(real)
        return real is not self.lie if self.lie else real

    def lose(self, what):
        self.lost.append(what)

    def text(self, real):
        return real


@pytest.mark.parametrize(
    ("compare", "other", "real"),
    [
        (operator.gt, 5, True),
        (operator.gt, 8.5, False),  # int itself leaves this to float
        (operator.lt, 8.5, True),
        (operator.eq, 8, True),
        (operator.ne, 8.0, False),
    ],
)
def test_a_comparison_is_asked_for(compare, other, real):
    ear = Ear()
    with listening(ear):
        assert compare(followed(8), other) is real
    assert len(ear.asked) == 1


def test_a_whole_number_on_the_left_leaves_the_answer_to_the_size():
    ear = Ear()
    with listening(ear):
        assert followed(8) > 5
        assert followed(8.5) > 2.5
    assert len(ear.asked) == 2


def test_the_answer_is_the_listeners():
    class Otherwise(Ear):
        def truth(self, real):
            return not real

    with listening(Otherwise()):
        assert not followed(8) > 5
        assert (1 if followed(8) else 0) == 0


@pytest.mark.parametrize(
    "compute",
    [
        lambda h: h + 1,
        lambda h: 17 - h,
        lambda h: h * 0.5,
        lambda h: 0.5 * h,
        lambda h: 1.5 * (h / 3),
        lambda h: h / 3,
        lambda h: h // 3,
        lambda h: 100 % h,
        lambda h: divmod(h, 3)[1],
        lambda h: 2**h,
        lambda h: h >> 1,
        lambda h: -h,
        lambda h: math.ceil(h / 3),
        lambda h: round(h * 0.3),
        lambda h: max(h, 3),
        lambda h: sum([h, h]),
        lambda h: math.prod([h, h]),
    ],
)
def test_what_is_computed_of_a_size_is_followed_and_right(compute):
    ear = Ear()
    with listening(ear):
        result = compute(followed(8))
        asked = len(ear.asked)
        assert plain(result) == compute(8)
        assert result > 0 or result <= 0
    assert len(ear.asked) > asked
    assert ear.lost == []


@pytest.mark.parametrize(
    "leave",
    [
        int,
        float,
        lambda h: h.bit_length(),
        lambda h: list(range(9))[h],
        lambda h: range(h),
        lambda h: math.log2(h),
        lambda h: math.sqrt(h / 2),
        lambda h: [1, 2][:h],
        lambda h: len(counted((h, h))),
    ],
)
def test_what_becomes_a_plain_number_is_lost(leave):
    ear = Ear()
    with listening(ear):
        leave(followed(8))
    assert len(ear.lost) == 1


def test_what_remembers_by_its_arguments_is_given_no_size():
    ear = Ear()
    with listening(ear), pytest.raises(TypeError, match="has no hash"):
        hash(followed(8))
    assert ear.lost == ["looked up by its hash"]
    assert hash(followed(8)) == hash(8)


def test_parts_of_a_tensor_are_taken_apart_without_being_counted():
    ear = Ear()
    with listening(ear):
        first, second = counted((1, 2))
        assert [part for part in counted((first, second))] == [1, 2]  # noqa: C416
    assert ear.lost == []


def test_text_for_a_message_loses_nothing():
    ear = Ear()
    with listening(ear):
        assert f"{followed(8)} of {followed(2.5)}" == "8 of 2.5"
    assert ear.lost == []


class PlainForTorch(TorchFunctionMode):
    """As the recording does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*plain(args), **plain(kwargs or {}))


def test_torch_takes_them_where_it_is_given_the_numbers_they_are():
    shape = followed(torch.Size([2, 3]))
    assert type(shape) is torch.Size
    with PlainForTorch():
        assert torch.zeros(shape).view(shape[0] * shape[1]).shape == (6,)
        assert torch.arange(9)[: shape[1]].tolist() == [0, 1, 2]
        assert F.interpolate(torch.zeros(1, 1, 2), size=shape[1] * 2).shape == (1, 1, 6)
        assert torch.equal(torch.ones(2) * shape[1], torch.full((2,), 3.0))


def test_they_are_the_numbers_that_code_expects():
    assert isinstance(followed(8), int)
    assert isinstance(followed(8) / 3, float)
    assert not isinstance(followed(8), float)


def test_nobody_listening_they_are_plain_numbers():
    assert followed(8) > 5
    assert followed([2, (3.5, "x")]) == [2, (3.5, "x")]
