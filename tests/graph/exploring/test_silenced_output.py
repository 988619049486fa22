"""What runs on made-up answers is not heard, changes nothing outside, and all is put back."""

import logging
import os
import subprocess
import sys
import threading

import pytest
import torch

from torchfuse.graph.exploring import output_silenced


def state() -> tuple[object, ...]:
    return sys.stdin, sys.stdout, sys.stderr, logging.root.manager.disable


def test_prints_and_logs_are_not_heard_and_nobody_is_asked(capsys, caplog):
    before = state()
    with output_silenced():
        print("a print")
        logging.getLogger("a").error("a record")
        assert sys.stdin.readline() == ""
    assert (capsys.readouterr().out, caplog.messages, state()) == ("", [], before)


def test_two_threads_put_back_what_was_there_before_either():
    before, inside, leave, done = state(), *(threading.Event() for _ in range(3))

    def first():
        with output_silenced():
            inside.set()
            leave.wait(0.2)  # unless the other waits for its turn, it comes in and says so
        done.set()

    def second():
        inside.wait()
        with output_silenced():
            leave.set()
            done.wait()

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_text("changed"),
        lambda file: open(file, "a"),  # noqa: SIM115  # it raises
        lambda file: os.open(file, os.O_WRONLY),
        lambda file: file.unlink(),
        lambda file: file.rename(file.with_suffix(".old")),
        lambda file: torch.save({}, file),
        lambda file: subprocess.run([sys.executable, "-c", "pass"], check=True),
        lambda file: (file.parent / "folder").mkdir(),
    ],
)
def test_nothing_outside_is_changed(tmp_path, change):
    file = tmp_path / "file.txt"
    file.write_text("as it was")
    with output_silenced(), pytest.raises(OSError, match="changes nothing outside"):
        change(file)
    assert [*tmp_path.iterdir()] == [file]
    assert file.read_text() == "as it was"
    file.write_text("changed afterwards")


def test_files_can_be_read_and_other_threads_go_on(tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("as it was")
    other = threading.Thread(target=lambda: (tmp_path / "other.txt").write_text("written"))
    with output_silenced():
        assert file.read_text() == "as it was"
        other.start()
        other.join()
    assert (tmp_path / "other.txt").read_text() == "written"
