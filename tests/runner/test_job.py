"""The lines that tell what happens in a job, and a whole job."""

import hashlib
import json
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchfuse.devices.events import checked
from torchfuse.runner.job import event, read_event, run_job

Files = Callable[[str], str]


def test_an_event_is_read_from_its_line() -> None:
    line = event(kind="round", samples_s={"0": [0.25]}, text="ü #")
    assert read_event(line + "\r\n") == {
        "kind": "round",
        "samples_s": {"0": [0.25]},
        "text": "ü #",
    }


def _with_checksum(text: str) -> str:
    return f"{text} #{zlib.crc32(text.encode()):08x}"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "hello",
        "WARNING: linker: something #1",
        '{"kind": "end"} #00000000',
        _with_checksum("not json"),
        _with_checksum("[1]"),
        _with_checksum("[" * 100_000),
        _with_checksum("9" * 5000),
    ],
)
def test_any_other_line_is_no_event(line: str) -> None:
    assert read_event(line) is None


def test_no_part_of_a_line_is_an_event() -> None:
    line = event(kind="end")
    assert all(read_event(line[:cut]) is None for cut in range(len(line)))
    assert all(read_event(line[cut:]) is None for cut in range(1, len(line)))


def _job(*paths: str, **what: Any) -> dict[str, Any]:
    one = {"ones": [1, 3, 4, 4], "dtype": "float32"}
    artifacts = [
        {"path": path, "form": Path(path).suffix[1:], "args": [one], "kwargs": {}} for path in paths
    ]
    job = {"artifacts": artifacts, "threads": 1, "seed": 0, "done": 0, "warmup": 1, "runs": 2}
    return job | what


def _told(job: dict[str, Any], folder: Path) -> list[Any]:
    lines: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as the command does: torch.jit.load is deprecated
        run_job(job, folder, lines.append)
    return [read_event(line) for line in lines]


def test_a_job_tells_each_thing_that_happens_in_order(model_files: Files, tmp_path: Path) -> None:
    events = _told(_job(model_files("third.pt"), model_files("third.ptl")), tmp_path)
    kinds = [told["kind"] for told in events]
    assert kinds == [
        *("runtime", "runtime", "loaded", "loaded", "warm", "warm", "state"),
        *("round", "round", "state", "measured", "measured", "end"),
    ]
    for told in events:
        assert checked(told, 2) == told  # what a device may tell is what the runner tells
    (output,) = events[2]["outputs"]
    data = (tmp_path / output["file"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == output["sha256"]
    assert (output["dtype"], output["shape"], len(data)) == ("float32", [1, 3, 4, 4], 192)


def test_a_job_without_runs_only_calls_each_model_once(model_files: Files, tmp_path: Path) -> None:
    events = _told(_job(model_files("third.pt"), runs=0), tmp_path)
    assert [told["kind"] for told in events] == ["runtime", "loaded", "end"]


def test_a_model_that_cannot_be_loaded_is_told_and_ends_the_job(
    model_files: Files, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"no model")
    events = _told(_job(model_files("third.pt"), str(damaged)), tmp_path)
    assert [told["kind"] for told in events] == ["runtime", "loaded", "failed", "end"]
    assert events[2]["artifact"] == 1
    assert json.dumps(events[2]["reason"])


def test_a_form_that_nothing_here_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"got 'model\.tflite' with suffix '\.tflite'"):
        _told(_job("model.tflite"), tmp_path)
