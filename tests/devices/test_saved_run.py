"""What a runner saved on another machine, whole, cut, damaged, or something else."""

from pathlib import Path
from typing import Any

import pytest

from devices.test_record import FAILED, LOADED, MEASURED, RUNTIME, WARM, round_
from torchfuse.devices.saved_run import run_from_record
from torchfuse.errors import InputError
from torchfuse.runner.job import event

JOB = {
    "kind": "job",
    "artifacts": [
        {"name": "a.pte", "size_bytes": 10, "sha256": "aa"},
        {"name": "b.pte", "size_bytes": 20, "sha256": "bb"},
    ],
    "threads": 1,
    "round_id": "r",
}
SECOND = [{**LOADED, "artifact": 1, "outputs": []}, {**WARM, "artifact": 1}]
ROUNDS = [round_(1, [1.0, 2.0], [3.0, 4.0]), round_(2, [5.0, 6.0], [7.0, 8.0])]
WHOLE = [JOB, RUNTIME, LOADED, WARM, *SECOND, *ROUNDS, MEASURED, {"kind": "end"}]


def saved(folder: Path, *events: dict[str, Any], end: str = "") -> Path:
    path = folder / "raspberry.txt"
    path.write_text("".join(f"{event(**told)}\n" for told in events) + end)
    return path


def test_it_is_a_run_of_a_device_of_the_file_s_name(tmp_path: Path) -> None:
    run = run_from_record(saved(tmp_path, *WHOLE))
    assert (run.device.name, run.device.architecture) == ("raspberry.txt", "aarch64")
    assert (run.runner, run.error) == ("executorch 1.4", None)
    assert [(m.name, m.runs, m.round_id) for m in run.measurements] == [
        ("a.pte", 4, "r"),
        ("b.pte", 4, "r"),
    ]


def test_one_that_was_cut_gives_its_whole_rounds_and_says_so(tmp_path: Path) -> None:
    half = event(**ROUNDS[1])[:40]
    run = run_from_record(saved(tmp_path, *WHOLE[:7], end=half))
    assert [m.runs for m in run.measurements] == [2, 2]
    assert run.error is not None
    assert "ends before the run did; what is there of it is whole rounds" in run.error


def test_a_model_that_failed_there_is_said_to_have(tmp_path: Path) -> None:
    run = run_from_record(saved(tmp_path, JOB, RUNTIME, FAILED, {"kind": "end"}))
    assert (run.error, run.measurements) == ("b.pte: no kernel.", ())


@pytest.mark.parametrize(
    "events",
    [
        [],
        WHOLE[1:],
        [{**JOB, "artifacts": None}],
        [{**JOB, "artifacts": [{}]}],
        [{"kind": "job"}],
        [JOB, {**LOADED, "artifact": 5}],
        [JOB, {**LOADED, "load_s": "soon"}],
    ],
)
def test_anything_else_is_an_error(tmp_path: Path, events: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError, match=r"^Expected what 'python3 -m torchfuse\.runner --save'"):
        run_from_record(saved(tmp_path, *events, end="hello\n"))


def test_no_text_and_no_file_are_errors(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("binary", "none", "."):
        with pytest.raises(InputError, match=r"cannot be read: "):
            run_from_record(tmp_path / name)
