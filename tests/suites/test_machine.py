"""Turns on a machine: builds beside each other, a measurement alone, nobody waits for the dead."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from torchfuse.suites.machine import Turn

HOLD = """
import sys, time
from pathlib import Path
from torchfuse.suites.machine import Turn
with Turn(Path(sys.argv[1])).alone():
    print("alone", flush=True)
    time.sleep(60)
"""


def begun(turn: Turn, how: str, log: list[str], ends: threading.Event) -> threading.Thread:
    def run() -> None:
        with turn.alone() if how == "alone" else turn.beside():
            log.append(how)
            ends.wait(30)
            log.append(f"{how} ended")

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def until(log: list[str], count: int) -> None:
    while len(log) < count:
        time.sleep(0.01)


def waits(turn: Turn) -> None:
    while turn.waited_s() < 0.05:
        time.sleep(0.01)


def test_who_waits_to_be_alone_comes_before_who_begins_later(tmp_path: Path) -> None:
    log: list[str] = []
    first, second, third = (threading.Event() for _ in range(3))
    turns = [Turn(tmp_path) for _ in range(3)]
    threads = [begun(turns[0], "beside", log, first)]
    until(log, 1)
    threads.append(begun(turns[1], "alone", log, second))
    waits(turns[1])
    threads.append(begun(turns[2], "beside", log, third))
    waits(turns[2])
    assert log == ["beside"]
    for event in (first, second, third):
        event.set()
    for thread in threads:
        thread.join()
    assert log == [
        "beside", "beside ended", "alone", "alone ended", "beside", "beside ended",
    ]  # fmt: skip


def test_builds_run_beside_each_other_and_give_way_between_steps(tmp_path: Path) -> None:
    log: list[str] = []
    ends = threading.Event()
    with Turn(tmp_path).beside():
        mine = Turn(tmp_path)
        with mine.beside():  # at once
            pass
    mine, other = Turn(tmp_path), Turn(tmp_path)
    with mine.beside():
        ends.set()
        thread = begun(other, "alone", log, ends)
        waits(other)
        assert log == []
        mine.let_others()
        assert log == ["alone", "alone ended"]
    thread.join()
    assert mine.waited_s() > 0


def test_a_process_that_is_killed_lets_others_run(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "alone\n"
    process.send_signal(signal.SIGKILL)
    with Turn(tmp_path).beside():
        pass
    process.communicate()


def test_a_device_is_had_by_one_at_a_time(tmp_path: Path) -> None:
    one, other = Turn(tmp_path), Turn(tmp_path)
    log: list[str] = []

    def use() -> None:
        with other.on_device("adb:x"):
            log.append("other")

    with one.on_device("adb:x"):
        thread = threading.Thread(target=use)
        thread.start()
        waits(other)
        with Turn(tmp_path).on_device("ssh:y"):  # at once
            assert log == []
    thread.join()
    assert log == ["other"]
