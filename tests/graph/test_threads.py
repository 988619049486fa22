"""Work handed to another thread, and memory handed to another library, are noticed."""

import _thread
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool

import pytest
import torch

from torchfuse.graph.threads import handing_over

START = threading.Thread.start  # not the watched one


def noticed(work):
    threads, tensors = [], []
    with handing_over(lambda: threads.append(1), tensors.append):
        work()
    return bool(threads), tensors


def in_a_thread():
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()


def in_a_raw_thread():
    lock = _thread.allocate_lock()
    lock.acquire()
    _thread.start_new_thread(lock.release, ())
    lock.acquire()


def in_a_pool():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()


def in_a_multiprocessing_pool():
    with ThreadPool(1) as pool:
        pool.map(int, [1])


def through_a_queue():
    queue.Queue().put(1)


def by_an_event_that_is_waited_for():
    event, ready = threading.Event(), threading.Event()

    def wait():
        ready.set()
        event.wait()

    START(threading.Thread(target=wait, daemon=True))
    ready.wait()
    while not event._cond._waiters:
        pass
    event.set()


@pytest.mark.parametrize(
    "work",
    [
        in_a_thread,
        in_a_raw_thread,
        in_a_pool,
        in_a_multiprocessing_pool,
        through_a_queue,
        by_an_event_that_is_waited_for,
    ],
)
def test_work_that_another_thread_gets_is_noticed(work):
    assert noticed(work) == (True, [])


def test_an_event_that_nobody_waits_for_is_nothing():
    assert noticed(lambda: threading.Event().set()) == (False, [])


def test_what_other_threads_do_meanwhile_is_nothing():
    watched, done = [], []

    def start_another():
        while not watched:
            time.sleep(0.001)
        in_a_thread()
        done.append(1)

    START(threading.Thread(target=start_another, daemon=True))

    def work():
        watched.append(1)
        while not done:
            time.sleep(0.001)

    assert noticed(work) == (False, [])


def test_a_tensor_given_away_as_dlpack_is_noticed():
    tensor = torch.randn(3)
    handed, tensors = noticed(lambda: torch.utils.dlpack.to_dlpack(tensor))
    assert not handed
    assert len(tensors) == 1
    assert tensors[0] is tensor


def test_everything_is_as_it_was_afterwards():
    before = (threading.Thread.start, _thread.start_new_thread, torch.utils.dlpack.to_dlpack)
    with pytest.raises(RuntimeError, match="fails"):
        noticed(lambda: (_ for _ in ()).throw(RuntimeError("fails")))
    assert before == (
        threading.Thread.start,
        _thread.start_new_thread,
        torch.utils.dlpack.to_dlpack,
    )
