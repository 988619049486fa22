"""Workers, forked from a process of their own: what they do, and what is told of their end."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchfuse.runner.workers import Worker, WorkerError, start_workers

Files = Callable[[str], str]


def _load(worker: Worker, path: str, folder: Path) -> dict[str, Any]:
    return worker.ask(
        "load",
        form=Path(path).suffix[1:],
        path=path,
        args=[{"ones": [1, 3, 4, 4], "dtype": "float32"}],
        kwargs={},
        threads=1,
        folder=str(folder),
        outputs=f"output-{worker.index}-",
    )


def test_workers_load_warm_up_take_turns_say_what_memory_they_took_and_how_they_ended(
    model_files: Files, tmp_path: Path
) -> None:
    # One test, since starting them takes the seconds in which torch is imported.
    with start_workers(3, ["pt"]) as (first, second, third):
        for worker in (first, second):
            facts = _load(worker, model_files("third.pt"), tmp_path)
            assert facts["load_s"] > 0
            assert facts["threads"] == 1
            assert facts["can_set_threads"] is True
            assert facts["outputs"][0]["file"] == f"output-{worker.index}-0.bin"
        assert first.ask("warm_up", count=3) == {"warmup_runs": 3, "settled": None}
        assert all(time_s > 0 for time_s in first.turn(2, 4))
        assert len(second.turn(0, 1)) == 1
        memory = first.ask("memory")
        assert memory["peak_memory_bytes"] > facts["idle_memory_bytes"] / 2
        # A file that cannot be loaded is an error, after which the worker takes the next.
        damaged = tmp_path / "damaged.pt"
        damaged.write_bytes(b"no model")
        with pytest.raises(WorkerError) as caught:
            _load(third, str(damaged), tmp_path)
        assert (caught.value.index, "\n" in str(caught.value)) == (2, False)
        _load(third, model_files("third.pt"), tmp_path)
        # One that ends says how, and ends no other.
        os.kill(_pid_of(2), signal.SIGSEGV)
        with pytest.raises(WorkerError, match=r"its process ended by signal 11 \(SIGSEGV\)"):
            third.turn(0, 1)
        assert len(first.turn(0, 1)) == 1
        pids = [_pid_of(index) for index in (0, 1)]
    deadline = time.monotonic() + 10  # they were killed; the kernel takes a moment
    while any(map(_runs, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"  # whoever adopts it is in no hurry to reap it


def _pid_of(index: int) -> int:
    """The process id of a worker: the nursery's children, in the order that they were forked in."""
    mine = f"/proc/{os.getpid()}/task"
    children = [
        int(pid)
        for task in Path(mine).iterdir()
        for pid in (task / "children").read_text().split()
        if b"workers import nurse" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    (nursery,) = children
    workers = Path(f"/proc/{nursery}/task/{nursery}/children").read_text().split()
    return sorted(map(int, workers))[index]


def test_half_an_answer_is_the_end_of_its_process() -> None:
    command_reader, commands = os.pipe()
    answers, answer_writer = os.pipe()
    os.write(answer_writer, b'{"samples_s": [0.1')
    os.close(answer_writer)
    worker = Worker(4, (commands, answers), lambda: "by signal 9 (SIGKILL)")
    with pytest.raises(WorkerError, match=r"its process ended by signal 9") as caught:
        worker.turn(0, 1)
    assert caught.value.index == 4
    worker.close()
    os.close(command_reader)


def test_no_workers_are_no_process() -> None:
    with start_workers(0, []) as workers:
        assert workers == []
