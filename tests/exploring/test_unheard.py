"""What runs on made-up answers is not heard, and all is put back."""

import logging
import sys
import threading

from torchfuse.exploring import unheard


def state() -> tuple[object, ...]:
    return sys.stdin, sys.stdout, sys.stderr, logging.root.manager.disable


def test_prints_and_logs_are_not_heard_and_nobody_is_asked(capsys, caplog):
    before = state()
    with unheard():
        print("a print")
        logging.getLogger("a").error("a record")
        assert sys.stdin.readline() == ""
    assert (capsys.readouterr().out, caplog.messages, state()) == ("", [], before)


def test_two_threads_put_back_what_was_there_before_either():
    before, inside, leave, done = state(), *(threading.Event() for _ in range(3))

    def first():
        with unheard():
            inside.set()
            leave.wait(0.2)  # unless the other waits for its turn, it comes in and says so
        done.set()

    def second():
        inside.wait()
        with unheard():
            leave.set()
            done.wait()

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state() == before
