"""An output that something else reads, keeps or changes is not folded away.

The numbers are upstream issues: pt is pytorch/pytorch, ao pytorch/ao.
"""

import _thread
import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch
from torch import Tensor, nn

import torchfuse
from support.fusing_checks import (
    IMAGE,
    ConvBn,
    assert_fuses,
    assert_skipped,
    check,
    check_not_folded,
    trained,
)

SECOND_READERS = {
    "an addition": lambda y, z: z + y,
    "an addition in place": lambda y, z: z.add_(y),
    "a view": lambda y, z: (z, y.view(-1)[3]),
    "a detached alias": lambda y, z: (z, y.detach()),
    "a slice": lambda y, z: (z, y[:, :1] * 1),
    "a mean": lambda y, z: z + y.mean((2, 3), keepdim=True),
    "a cat": lambda y, z: torch.cat([z, y], 1),
    "an output": lambda y, z: (z, y),
    "an output in a dict": lambda y, z: {"logits": z, "hidden": [y]},
    "numpy": lambda y, z: z * float(y.detach().numpy().mean()),
    "a python number": lambda y, z: z * y.sum().item(),
    "a list of numbers": lambda y, z: z * y.flatten().tolist()[0],
    "a format": lambda y, z: (z, f"{y.mean():.3f}"),
    "a chunk": lambda y, z: z + y.chunk(2, 1)[0].repeat(1, 2, 1, 1),
    "an iteration": lambda y, z: z + next(iter(y)),
    "an index": lambda y, z: z + y[0, 0, 0, 0],
    "an einsum": lambda y, z: z + torch.einsum("nchw->n", y).view(-1, 1, 1, 1),
    "DLPack": lambda y, z: z + torch.from_dlpack(y.detach()),
    "a data alias": lambda y, z: z + y.data,
}


@pytest.mark.parametrize("reader", SECOND_READERS)
def test_a_conv_output_with_a_second_reader_is_skipped_pt197539(reader: str) -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> object:
            y = self.conv(x)
            return SECOND_READERS[reader](y, self.bn(y))

    assert_skipped(
        trained(Model(), IMAGE), IMAGE, because="(output|read|used|alive|held|seen|branch|value)"
    )


def test_a_view_made_before_and_read_after_the_batch_norm_is_a_reader() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            view = y.flatten(1)
            return self.bn(y).flatten(1) + view

    assert_skipped(trained(Model(), IMAGE), IMAGE, because="(output|read|used)")


def test_a_change_in_place_between_conv_and_batch_norm_is_seen() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y += 1
            return self.bn(y)

    check_not_folded(Model())


def test_a_change_through_a_view_is_seen() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y[:, 0].zero_()
            return self.bn(y)

    check_not_folded(Model())


def test_a_change_through_out_is_seen() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            torch.add(y, 1.0, out=y)
            return self.bn(y)

    with torch.no_grad():
        check_not_folded(Model())


def test_a_change_through_data_is_seen() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y.data.mul_(2)
            return self.bn(y)

    check_not_folded(Model())


def test_shape_queries_are_not_readers() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            assert y.dim() == 4
            assert y.dtype == torch.float32
            assert not y.is_cuda
            assert y.device.type == "cpu"
            return self.bn(y)

    assert_fuses(trained(Model(), IMAGE), IMAGE)


def test_an_output_kept_on_the_model_is_a_reader() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            self.features = self.conv(x)
            return self.bn(self.features)

    model = trained(Model(), IMAGE)
    del model.features
    result = assert_skipped(model, IMAGE, because="(kept|held|alive|outlives)")
    assert not hasattr(model, "features"), "the recorded run left something on the model"
    result.model(IMAGE)
    torch.testing.assert_close(result.model.features, model.conv(IMAGE))


def test_an_output_kept_in_a_list_outside_is_a_reader() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            kept.append(y)
            return self.bn(y)

    kept: list[Tensor] = []
    assert_skipped(trained(Model(), IMAGE), IMAGE, because="(kept|held|alive|outlives)")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_an_output_read_by_a_scripted_function_is_seen() -> None:
    @torch.jit.script
    def mean(x: Tensor) -> Tensor:
        return x.mean()

    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) + mean(y)

    check_not_folded(Model())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_an_output_read_by_a_scripted_module_is_seen() -> None:
    class Model(ConvBn):
        def __init__(self) -> None:
            super().__init__()
            self.scripted = torch.jit.script(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)))

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) + self.scripted(y)

    model = ConvBn.eval(Model())
    assert torchfuse.plan(model, IMAGE).fusions == ()


def test_an_output_read_in_another_thread_is_seen() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            result = []
            thread = threading.Thread(target=lambda: result.append(y.detach().mean()))
            thread.start()
            thread.join()
            return self.bn(y) + result[0]

    check_not_folded(Model())


def test_post_processing_in_a_thread_pool_is_no_obstacle_to_what_ran_before() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            with ThreadPoolExecutor(1) as pool:
                return torch.stack(list(pool.map(lambda entry: entry * 2, y)))

    assert_fuses(trained(Model(), IMAGE), IMAGE)


def test_what_is_alive_when_a_thread_starts_may_be_read_there() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = self.bn(y)
            with ThreadPoolExecutor(1) as pool:
                return z + pool.submit(lambda: y.detach().mean()).result()

    assert_skipped(trained(Model(), IMAGE), IMAGE, because="another thread")


def test_a_conv_that_runs_in_another_thread_stays_right() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            result = []
            thread = threading.Thread(target=lambda: result.append(self.conv(x.detach())))
            thread.start()
            thread.join()
            return self.bn(result[0])

    check(trained(Model(), IMAGE).requires_grad_(False), IMAGE)


def test_an_output_read_by_a_custom_autograd_function_is_seen() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad * 2

    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) + Double.apply(y)

    check_not_folded(Model())


def test_an_output_changed_by_a_custom_autograd_function_before_the_batch_norm_is_seen() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(Double.apply(self.conv(x)))

    check_not_folded(Model())


class Worker:
    """A thread that was there before, and takes the mean of what it is given."""

    def __init__(self) -> None:
        self.given, self.wanted, self.done = None, threading.Event(), threading.Event()
        self.tasks: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self.wait_for_event, daemon=True).start()
        threading.Thread(target=self.wait_for_task, daemon=True).start()

    def wait_for_event(self) -> None:
        while True:
            self.wanted.wait()
            self.wanted.clear()
            self.given = self.given.mean().item()
            self.done.set()

    def wait_for_task(self) -> None:
        while True:
            tensor, answer = self.tasks.get()
            answer.append(tensor.mean().item())
            self.done.set()

    def by_event(self, y: Tensor) -> float:
        self.given = y
        self.wanted.set()
        self.done.wait()
        self.done.clear()
        return self.given


WORKER = Worker()


class ReadByEvent(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + WORKER.by_event(y)


class ReadFromAQueue(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        y, answer = self.conv(x), []
        WORKER.tasks.put((y, answer))
        WORKER.done.wait()
        WORKER.done.clear()
        return self.bn(y) + answer[0]


class ReadInARawThread(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        y, answer, done = self.conv(x), [], threading.Event()

        def read() -> None:
            answer.append(y.mean().item())
            done.set()

        _thread.start_new_thread(read, ())
        done.wait()
        return self.bn(y) + answer[0]


@pytest.mark.parametrize("class_", [ReadByEvent, ReadFromAQueue, ReadInARawThread])
def test_an_output_handed_to_a_thread_that_is_there_already_is_seen(
    class_: type[nn.Module],
) -> None:
    assert_skipped(trained(class_(), IMAGE), IMAGE, because="another thread")


def test_an_output_handed_to_another_library_by_dlpack_is_seen() -> None:
    class Capsule:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def __dlpack__(self, **options: object) -> object:
            return torch.utils.dlpack.to_dlpack(self.tensor)

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) + float(numpy.from_dlpack(Capsule(y)).mean())

    assert_skipped(trained(Model(), IMAGE), IMAGE, because="DLPack")


def test_models_that_run_in_other_threads_meanwhile_are_no_obstacle() -> None:
    mine, other, stop = trained(ConvBn(), IMAGE), trained(ConvBn(), IMAGE), threading.Event()

    def serve() -> None:
        with torch.no_grad():
            while not stop.is_set():
                other(IMAGE)

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        for _ in range(3):
            assert_fuses(mine, IMAGE)
    finally:
        stop.set()
        serving.join()


def test_two_threads_can_plan_at_the_same_time() -> None:
    models = [trained(ConvBn(), IMAGE) for _ in range(3)]
    call, found = nn.Module.__call__, []
    threads = [
        threading.Thread(target=lambda m=model: found.append(torchfuse.plan(m, IMAGE)))
        for model in models
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(plan.fusions) for plan in found] == [1, 1, 1]
    assert nn.Module.__call__ is call
