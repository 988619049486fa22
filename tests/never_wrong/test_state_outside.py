"""State that a call changes, wherever it is kept, may send a later call another way."""

import contextvars
import itertools
import os
import random
import re
import threading
import types

import numpy as np
import pytest
from torch import nn

import torchfuse
from support.fusing_checks import IMAGE, ConvBn

NOTHING_YET = None
OBJECT = types.SimpleNamespace(calls=0)
COUNTER = itertools.count()
VARIABLE = contextvars.ContextVar("VARIABLE", default=0)
ARRAY = np.zeros(1)
GENERATOR = np.random.default_rng(0)
OF_THIS_THREAD = threading.local()
OF_THIS_THREAD.calls = 0


def keeps_count():
    calls = 0

    def is_early():
        nonlocal calls
        calls += 1
        return calls < 50

    return is_early


IS_EARLY = keeps_count()


class Counting(ConvBn):
    calls = 0

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if self.is_early() else y


class InItsClass(Counting):
    def is_early(self):
        InItsClass.calls += 1
        return InItsClass.calls < 50


class InAGlobal(Counting):
    def is_early(self):
        global NOTHING_YET
        NOTHING_YET = (NOTHING_YET or 0) + 1
        return NOTHING_YET < 50


class InAnObject(Counting):
    def is_early(self):
        OBJECT.calls += 1
        return OBJECT.calls < 50


class InAnIterator(Counting):
    def is_early(self):
        return next(COUNTER) < 50


class InADefault(Counting):
    def is_early(self, calls=[]):  # noqa: B006
        calls.append(1)
        return len(calls) < 50


class InAClosure(Counting):
    def is_early(self):
        return IS_EARLY()


class InAContext(Counting):
    def is_early(self):
        VARIABLE.set(VARIABLE.get() + 1)
        return VARIABLE.get() < 50


class InTheThread(Counting):
    def is_early(self):
        OF_THIS_THREAD.calls += 1
        return OF_THIS_THREAD.calls < 50


class InAFunction(Counting):
    def is_early(self):
        InAFunction.is_early.calls = getattr(InAFunction.is_early, "calls", 0) + 1
        return InAFunction.is_early.calls < 50


class InAnArray(Counting):
    def __init__(self):
        super().__init__()
        self.calls = np.zeros(1)

    def is_early(self):
        self.calls += 1
        return self.calls[0] < 50


class InAGlobalArray(Counting):
    def is_early(self):
        ARRAY[0] += 1
        return ARRAY[0] < 50


class InAGenerator(Counting):
    def __init__(self):
        super().__init__()
        self.generator = random.Random(0)

    def is_early(self):
        return self.generator.random() < 0.9


class InAGlobalGenerator(Counting):
    def is_early(self):
        return GENERATOR.random() < 0.9


class InTheEnvironment(Counting):
    def is_early(self):
        os.environ["CALLS"] = str(int(os.environ.get("CALLS", "0")) + 1)
        return int(os.environ["CALLS"]) < 50


class InALengthOfText(Counting):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if len(f"{x.shape[-1]}") < 2 else y


@pytest.mark.parametrize(
    "model",
    [
        *(InItsClass, InAGlobal, InAnObject, InAnIterator, InADefault, InAClosure, InAContext),
        *(InTheThread, InAFunction, InTheEnvironment, InALengthOfText),
        *(InAnArray, InAGlobalArray, InAGenerator, InAGlobalGenerator),
    ],
)
def test_code_that_branches_on_state_that_a_call_changes_is_skipped(
    model: type[nn.Module],
) -> None:
    before = dict(os.environ)
    plan = torchfuse.plan(model().eval(), IMAGE)
    assert plan.fusions == ()
    assert any(re.search("(another|every) path", skip.reason) for skip in plan.skips), plan.skips
    assert dict(os.environ) == before


def test_state_outside_is_put_back() -> None:
    drawn = repr(GENERATOR.bit_generator.state)
    for model in (
        *(InItsClass, InAGlobal, InAnObject, InADefault, InTheThread, InAFunction),
        *(InAGlobalArray, InAGlobalGenerator),
    ):
        torchfuse.plan(model().eval(), IMAGE)
    assert InItsClass.calls == 0
    assert NOTHING_YET is None
    assert OBJECT.calls == OF_THIS_THREAD.calls == VARIABLE.get() == 0
    assert InADefault.is_early.__defaults__ == ([],)
    assert not hasattr(InAFunction.is_early, "calls")
    assert ARRAY[0] == 0
    assert repr(GENERATOR.bit_generator.state) == drawn
