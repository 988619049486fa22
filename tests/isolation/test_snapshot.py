"""A call leaves no trace, and what was seen of writes is told."""

import random
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchfuse.isolation.snapshot import (
    CopyOnWrite,
    Snapshot,
    put_back,
    random_state_kept,
    restored,
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("count", torch.zeros(()))
        self.plain = torch.zeros(3)
        self.table = {"a": 1}
        self.ordered = OrderedDict(a=1)
        self.items = [1, 2]
        self.queue = deque([1], maxlen=2)
        self.members = {1}
        self.inner = SimpleNamespace(values=[1], deeper=SimpleNamespace(flag=False))
        self.pair = ([1], 2)
        self.outputs = [torch.zeros(1)]
        self.counted = (torch.zeros(1), 1)
        self.generator = torch.Generator().manual_seed(1)
        self.python = random.Random(1)
        self.numpy = np.random.default_rng(1)
        self.twister = np.random.Generator(np.random.MT19937(1))
        self.legacy = np.random.RandomState(1)
        self.array = np.array([0.0, np.nan])
        self.number = 1


WRITES = {
    "a buffer in place": lambda m: m.count.add_(1),
    "a parameter in place": lambda m: m.layer.weight.mul_(2),
    "a view of a parameter": lambda m: m.layer.weight[0].zero_(),
    "a view that does not say so": lambda m: m.layer.weight.unsafe_chunk(2)[0].zero_(),
    "a plain tensor in place": lambda m: m.plain.add_(1),
    "running statistics": lambda m: m.norm.train()(torch.randn(4, 2)),
    "with out=": lambda m: torch.add(m.plain, 1, out=m.plain),
    "foreach": lambda m: torch._foreach_add_([m.plain, m.count], 1),
}
CHANGES = {
    **WRITES,
    "a parameter's data": lambda m: setattr(m.layer.weight, "data", torch.zeros(2, 2)),
    "another parameter": lambda m: setattr(m.layer, "weight", nn.Parameter(torch.zeros(2, 2))),
    "a gradient": lambda m: setattr(m.layer.weight, "grad", torch.zeros(2, 2)),
    "requires_grad": lambda m: m.layer.weight.requires_grad_(False),
    "another buffer": lambda m: setattr(m, "count", torch.ones(())),
    "a buffer less": lambda m: delattr(m, "count"),
    "a module more": lambda m: m.add_module("more", nn.Linear(1, 1)),
    "a module in the place of another": lambda m: setattr(m, "layer", nn.Identity()),
    "a training flag": lambda m: m.train(not m.training),
    "a hook": lambda m: m.layer.register_forward_hook(print),
    "an attribute": lambda m: setattr(m, "number", 2),
    "an attribute more": lambda m: setattr(m, "another", 2),
    "an attribute less": lambda m: delattr(m, "number"),
    "an entry more": lambda m: m.table.update(b=2),
    "another entry": lambda m: m.table.update(a=2),
    "entries in another order": lambda m: (m.ordered.update(b=2), m.ordered.move_to_end("a")),
    "an item more": lambda m: m.items.append(3),
    "another item": lambda m: m.items.__setitem__(0, 3),
    "a queue": lambda m: m.queue.append(3),
    "a member": lambda m: m.members.add(3),
    "a member in the place of another": lambda m: (m.members.clear(), m.members.add(3)),
    "a list in an object": lambda m: m.inner.values.append(3),
    "an object in an object": lambda m: setattr(m.inner.deeper, "flag", True),
    "a list in a tuple": lambda m: m.pair[0].append(3),
    "torch's generator": lambda m: torch.rand(1, generator=m.generator),
    "Python's generator": lambda m: m.python.random(),
    "numpy's generator": lambda m: m.numpy.random(),
    "numpy's twister": lambda m: m.twister.random(),
    "numpy's old generator": lambda m: m.legacy.rand(),
    "an array": lambda m: m.array.__iadd__(1),
    "other tensors": lambda m: setattr(m, "outputs", [torch.ones(1), torch.ones(1)]),
    "a tensor and a number": lambda m: setattr(m, "counted", (torch.ones(1), 2)),
    "torch's random state": lambda _: torch.rand(1),
    "Python's random state": lambda _: random.random(),
    "numpy's random state": lambda _: np.random.rand(),
}
# What code can branch on without asking a tensor, by the names that are given for it.
TOLD = {
    "running statistics": {"training"},
    "a buffer less": {"count"},
    "a module more": {"more"},
    "a module in the place of another": {"layer"},
    "a training flag": {"training"},
    "a hook": {"_forward_hooks"},
    "an attribute": {"number"},
    "an attribute more": {"another"},
    "an attribute less": {"number"},
    "an entry more": {"b"},
    "another entry": {"a"},
    "entries in another order": {"b"},
    "an item more": {"items"},
    "another item": {"items"},
    "a queue": {"queue"},
    "a member": {"members"},
    "a member in the place of another": {"members"},
    "a list in an object": {"inner"},
    "an object in an object": {"flag"},
    "a list in a tuple": {"pair"},
    "a tensor and a number": {"counted"},
    "Python's generator": {"python"},
    "numpy's generator": {"numpy"},
    "numpy's twister": {"twister"},
    "numpy's old generator": {"legacy"},
    "an array": {"array"},
    "Python's random state": {"Python's random state"},
    "numpy's random state": {"numpy's random state"},
}


def state(model: Model) -> dict[str, Any]:
    """All that a call could change, as something that can be compared."""
    tensors = {
        name: (id(t), t.detach().clone().tolist(), t.requires_grad, t.grad is None)
        for name, t in (*model.named_parameters(), *model.named_buffers(), ("plain", model.plain))
    }
    return {
        "tensors": tensors,
        "modules": [(name, id(m), m.training) for name, m in model.named_modules()],
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "attributes": list(vars(model)),
        "number": vars(model).get("number"),
        "containers": repr(
            [model.table, model.ordered, model.items, model.queue, model.members, model.inner]
        ),
        "tuples": repr([model.pair, model.outputs, model.counted]),
        "generators": [
            model.generator.get_state().tolist(),
            model.python.getstate(),
            repr(model.numpy.bit_generator.state),
            repr(model.twister.bit_generator.state),
            repr(model.legacy.get_state()),
            repr(model.array),
        ],
        "random": [
            torch.get_rng_state().tolist(),
            random.getstate(),
            repr(np.random.get_state()),
        ],
    }


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_leaves_no_trace(change: str) -> None:
    model = Model().eval()
    before = state(model)
    with restored(model):
        CHANGES[change](model)
        assert state(model) != before or "data" in change
    assert state(model) == before


@pytest.mark.parametrize("change", CHANGES)
def test_one_snapshot_puts_back_after_each_of_several_calls(change: str) -> None:
    model = Model().eval()
    snapshot = Snapshot(model)
    before = state(model)
    for _ in range(2):
        with restored(model, snapshot=snapshot):
            CHANGES[change](model)
        assert state(model) == before
    assert snapshot.wrote is (change in WRITES)


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_call_changed_is_told_by_name_but_for_the_values_of_tensors(change: str) -> None:
    model = Model().eval()
    snapshot = Snapshot(model)
    with restored(model, snapshot=snapshot):
        CHANGES[change](model)
    assert snapshot.changed == TOLD.get(change, set())


def in_another_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def the_function() -> Callable[[], float]:
    return random.random


@pytest.mark.parametrize(
    ("run", "changed"),
    [
        (random.random, {"Python's random state"}),
        (lambda: random.randint(1, 6), {"Python's random state"}),
        (np.random.rand, {"numpy's random state"}),
        (lambda: torch.rand(1), set()),
        (lambda: in_another_thread(random.random), set()),
        (lambda: in_another_thread(the_function()), set()),  # named here, and called there
    ],
    ids=["random", "randint", "numpy", "torch", "another thread", "another thread's function"],
)
def test_random_numbers_that_another_thread_draws_are_not_the_run_s(
    run: Callable[[], object], changed: set[str]
) -> None:
    model = nn.Identity()

    def once(snapshot: Snapshot | None = None) -> None:
        with restored(model, snapshot=snapshot):
            run()

    once(snapshot := Snapshot(model))
    assert snapshot.changed_by(once) == changed


def test_who_profiles_the_process_sees_all_of_it() -> None:
    model = nn.Identity()
    snapshot = Snapshot(model)
    with restored(model, snapshot=snapshot):
        random.random()
    seen = []
    sys.setprofile(lambda frame, event, called: seen.append(called))
    try:
        assert snapshot.changed_by(random.random) == {"Python's random state"}
        random.random()
    finally:
        sys.setprofile(None)
    assert random.random in seen


def test_a_call_that_raises_leaves_no_trace_either() -> None:
    model = Model()
    before = state(model)

    def call() -> None:
        model.count.add_(1)
        model.items.clear()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), restored(model):
        call()
    assert state(model) == before


def test_what_was_made_in_the_call_may_be_written_to_without_a_copy() -> None:
    given = torch.ones(2)
    with restored(nn.Identity(), mode := CopyOnWrite()):
        (given + 1).add_(1)
        given.clone().view(-1).mul_(2)
        torch.empty(2).copy_(given)
        assert not mode.wrote
        given.add_(1)
        assert mode.wrote
        given.add_(1)
    assert torch.equal(given, torch.ones(2))


def test_a_view_of_what_was_there_is_not_new() -> None:
    given = torch.ones(2, 2)
    with restored(nn.Identity()):
        given.t()[0].add_(1)
        given[0].relu_().neg_()
    assert torch.equal(given, torch.ones(2, 2))


def test_no_gradients_are_recorded() -> None:
    model = Model()
    with restored(model):
        assert not model.layer(torch.ones(1, 2)).requires_grad


def test_a_snapshot_that_does_not_watch_puts_all_back_but_what_was_written_in_place() -> None:
    model = Model().eval()
    snapshot = Snapshot(model, watch=False)
    with restored(model, snapshot=snapshot):
        model.count.add_(1)
        model.items.append(3)
        torch.rand(1)
    assert model.items == [1, 2]
    assert model.count == 1
    assert not snapshot.wrote


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_modules_are_put_back() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + 1
            return x * self.count

    model = torch.jit.script(Counts())
    with restored(model):
        assert model(torch.ones(1)) == 1
        assert model(torch.ones(1)) == 2
    assert model.count == 0


def test_buffers_are_given_values_of_their_own_and_shared_ones_stay_shared() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model[1].running_mean = model[0].running_mean
    kept = {f"{i}.running_mean": model[i].running_mean.clone() for i in range(1)}
    shared = kept["0.running_mean"]
    model[0].running_mean = torch.full((2,), 9.0)
    put_back(model, {"0.running_mean": shared, "1.running_mean": shared})
    assert model[0].running_mean is model[1].running_mean
    assert model[0].running_mean is not shared
    assert torch.equal(model[0].running_mean, torch.zeros(2))


def test_compiled_parts_run_as_the_python_they_came_from() -> None:
    def refuses(graph: object, inputs: object) -> Any:
        raise AssertionError("compiled")

    double = torch.compile(lambda x: x + x, backend=refuses)
    with restored(nn.Identity()):
        assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))


def test_the_random_state_can_be_kept_alone() -> None:
    def drawn() -> tuple[float, float, float]:
        return torch.rand(1).item(), random.random(), np.random.rand()

    with random_state_kept():
        first = drawn()
    with random_state_kept():
        assert drawn() == first


def test_a_generator_that_has_no_state_is_left_alone() -> None:
    model = nn.Linear(2, 2)
    model.system = random.SystemRandom()  # type: ignore[assignment]
    snapshot = Snapshot(model)
    model.system.random()  # type: ignore[operator]
    snapshot.put_back()
    assert snapshot.changed == set()
