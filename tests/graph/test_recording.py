import random
import sys
import threading
import time
import warnings
from multiprocessing.pool import ThreadPool

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchfuse.cases import Case
from torchfuse.errors import CaptureError
from torchfuse.graph.recording import record

X = torch.randn(2, 3, 8, 8)


class Block(nn.Module):
    """conv → bn, with a way to look at what lies between."""

    def __init__(self, between=lambda y: None):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.between = between

    def forward(self, x):
        y = self.conv(x)
        seen = self.between(y)
        z = self.bn(y)
        return z if seen is None else (z, seen)


def readers_between(between):
    """The kinds of everything that reads the conv's output, the batch norm apart."""
    model = Block(between).eval()
    graph = record(model, [Case((X,))])
    conv = next(call for call in graph.calls if call.kind == "conv")
    kinds = [call.kind for call in graph.readers(conv.results[0].value)]
    kinds.remove("batch_norm")
    return kinds


def scripted_sum(y):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")
        return torch.jit.script(plain_sum)(y)


def plain_sum(y: torch.Tensor):
    return y.sum()


def to_numpy_and_back(y):
    return torch.from_numpy(y.numpy()).sum()


def through_dlpack(y):
    return torch.from_dlpack(torch.utils.dlpack.to_dlpack(y)).sum()


@pytest.mark.parametrize(
    ("between", "kinds"),
    [
        (lambda y: y + 1, ["add"]),
        (lambda y: y, ["output"]),
        (lambda y: {"nested": [y]}, ["output"]),
        (lambda y: y.view(-1), ["view", "output"]),
        (lambda y: y[0].sum(), ["getitem", "sum"]),
        (lambda y: y.detach().numpy().sum(), ["detach", "numpy"]),
        (lambda y: torch.cat([y, y]), ["cat"]),
        (lambda y: F.relu(y, inplace=True), ["relu", "output"]),
        (lambda y: y.add_(1).sum(), ["add", "sum"]),
        (scripted_sum, ["unseen"]),
        (to_numpy_and_back, ["numpy", "unseen", "sum"]),
        (through_dlpack, ["unseen", "sum"]),
        (lambda y: torch.func.vmap(lambda row: row.sum())(y), ["sum"]),
        (lambda y: bool(y.sum() > 0), ["sum"]),
    ],
)
def test_every_use_of_a_value_is_seen(between, kinds):
    assert readers_between(between) == kinds


@pytest.mark.parametrize(
    "between",
    [
        lambda y: str([y.shape, y.size(1), y.dim(), y.dtype, y.device, y.numel(), len(y)]),
        lambda y: torch.zeros_like(y),
        lambda y: y.new_zeros(3),
        lambda y: y.is_floating_point(),
        lambda y: None,
    ],
)
def test_metadata_queries_are_no_uses(between):
    assert readers_between(between) == []


def test_a_tensor_that_something_still_holds_is_used():
    kept = []
    assert readers_between(kept.append) == ["held"]


def test_a_tensor_kept_in_an_attribute_is_used_and_the_attribute_put_back():
    model = Block().eval()
    model.between = lambda y: setattr(model, "last", y)
    graph = record(model, [Case((X,))])
    conv = next(call for call in graph.calls if call.kind == "conv")
    kinds = [call.kind for call in graph.readers(conv.results[0].value)]
    assert kinds == ["batch_norm", "held"]
    assert not hasattr(model, "last")


@pytest.mark.parametrize("where", ["conv", "bn", ""])
def test_what_a_hook_sees_is_used(where):
    model = Block().eval()
    (model.get_submodule(where)).register_forward_hook(lambda m, i, o: None)
    graph = record(model, [Case((X,))])
    conv = next(call for call in graph.calls if call.kind == "conv")
    kinds = [call.kind for call in graph.readers(conv.results[0].value)]
    assert kinds.count("hook") == (0 if where == "" else 1)


def test_work_in_another_thread_is_noted():
    def in_thread(y):
        worker = threading.Thread(target=lambda: y.sum())
        worker.start()
        worker.join()

    model = Block(in_thread).eval()
    assert record(model, [Case((X,))]).handed_over
    assert not record(Block().eval(), [Case((X,))]).handed_over


def test_calls_carry_kind_module_and_parameters():
    graph = record(Block().eval(), [Case((X,))])
    conv, bn = graph.calls[:2]
    assert (conv.kind, conv.module_path) == ("conv", "conv")
    assert (bn.kind, bn.module_path) == ("batch_norm", "bn")
    assert graph.values[conv.operands["weight"].value].names == ("conv.weight",)
    assert graph.values[bn.operands["running_mean"].value].names == ("bn.running_mean",)
    assert bn.attributes["training"] is False
    assert bn.operands["input"] == conv.results[0]
    assert [call.path for call in graph.module_calls] == ["", "conv", "bn"]


def test_tied_parameters_are_one_value_with_all_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    graph = record(model, [Case((torch.randn(2, 4),))])
    weight = graph.calls[0].operands["weight"].value
    assert graph.values[weight].names == ("0.weight", "1.weight")
    assert graph.calls[1].operands["weight"].value == weight


def test_data_and_shape_reads_are_noted_with_their_place():
    class Branching(nn.Module):
        def forward(self, x):
            if x.shape[-1] > 3 and x.sum() > 0:
                return x
            return -x

    reads = record(Branching(), [Case((X.abs(),))]).reads
    assert [read.kind for read in reads] == ["shape", "data"]
    assert reads[0].where.startswith("test_recording.py:")


def test_several_cases_are_merged_and_parameters_stay_the_same_value():
    graph = record(Block().eval(), [Case((X,)), Case((X[:1],))])
    convs = [call for call in graph.calls if call.kind == "conv"]
    assert [call.case for call in convs] == [0, 1]
    assert convs[0].operands["weight"] == convs[1].operands["weight"]
    assert convs[0].operands["input"].shape == (2, 3, 8, 8)
    assert convs[1].operands["input"].shape == (1, 3, 8, 8)


def test_a_model_that_fails_is_a_capture_error_that_names_the_case():
    with pytest.raises(CaptureError, match=r"Block failed on forward\(2×5×8×8\): RuntimeError"):
        record(Block(), [Case((torch.randn(2, 5, 8, 8),))])


def test_a_lazy_model_is_asked_to_be_run_first():
    with pytest.raises(CaptureError, match=r"0\.weight has no shape yet"):
        record(nn.Sequential(nn.LazyLinear(3)), [Case((X,))])


class Busy(nn.Module):
    """Changes everything a forward pass can change."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("cache", None, persistent=False)
        self.plain = torch.zeros(2)
        self.calls = 0
        self.history = []
        self.table = {"a": 1}
        self.generator = torch.Generator()

    def forward(self, x):
        self.calls += 1
        self.history.append(x)
        self.table["b"] = 2
        self.table["a"] = 3
        self.count += 1
        self.plain.add_(1)
        self.cache = x
        self.extra = nn.Linear(1, 1)
        self.weight.data = self.weight.data * 2
        self.bn.eval()
        torch.rand(1)
        torch.rand(1, generator=self.generator)
        random.random()
        x.mul_(2)
        with torch.enable_grad():
            self.weight.sum().backward()
        self.bn.train()
        return self.bn(x)


@pytest.mark.parametrize("training", [True, False])
def test_recording_leaves_no_trace(training):
    model = Busy().train(training)
    x = X.clone()
    weight, address = model.weight, model.weight.data_ptr()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = set(vars(model))
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    generator_state = model.generator.get_state()

    record(model, [Case((x,))])

    assert torch.equal(x, X)
    assert model.weight is weight
    assert (weight.data_ptr(), weight.grad) == (address, None)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.plain, torch.zeros(2))
    assert set(vars(model)) == attributes
    assert (model.calls, model.history, model.table, model.cache) == (0, [], {"a": 1}, None)
    assert [module.training for module in model.modules()] == [training] * 2
    assert list(model._modules) == ["bn"]
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert torch.equal(model.generator.get_state(), generator_state)
    assert random.getstate() == python_state
    assert torch.is_grad_enabled()


def test_a_thread_that_samples_stacks_reads_nothing():
    model, over = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), threading.Event()
    main = threading.get_ident()

    def sample():
        while not over.is_set():
            frame = sys._current_frames()[main]
            time.sleep(0.002)
            del frame

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        graphs = [record(model, [Case((torch.zeros(1, 2),))]) for _ in range(20)]
    finally:
        over.set()
        thread.join()
    assert {tuple(call.kind for call in graph.calls) for graph in graphs} == {
        ("linear", "relu", "output")
    }


def test_a_failing_pass_leaves_no_trace_either():
    class Failing(Busy):
        def forward(self, x):
            super().forward(x)
            raise ValueError("no")

    model = Failing()
    call = nn.Module.__call__
    with pytest.raises(CaptureError, match="ValueError: no"):
        record(model, [Case((X.clone(),))])
    assert (model.calls, model.count.item()) == (0, 0)
    assert nn.Module.__call__ is call


class Closing(Block):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y), lambda: y


class Slotted:
    __slots__ = ("y", "z")

    def __init__(self, y, z):
        self.y, self.z = y, z


class Slotting(Block):
    def forward(self, x):
        y = self.conv(x)
        return Slotted(y, self.bn(y))


@pytest.mark.parametrize("model", [Closing, Slotting])
def test_what_the_output_holds_in_other_ways_is_held(model):
    graph = record(model().eval(), [Case((X,))])
    conv = next(call for call in graph.calls if call.kind == "conv")
    kinds = [call.kind for call in graph.readers(conv.results[0].value)]
    assert kinds == ["batch_norm", "held"]


def test_showing_a_tensor_reads_it():
    assert readers_between(lambda y: f"{y}") == ["__format__"]
    assert readers_between(repr) == ["__repr__"]


def test_work_in_a_pool_that_was_there_before_is_noted():
    with ThreadPool(1) as pool:
        model = Block(lambda y: pool.apply(torch.sum, (y.detach(),))).eval()
        assert record(model, [Case((X,))]).handed_over
