"""What a runner's events add up to, and which a device is not believed."""

import dataclasses
import json
from typing import Any

import pytest

from torchfuse.devices.events import checked
from torchfuse.devices.record import ArtifactName, Record
from torchfuse.runner.job import event
from torchfuse.runner.machine_state import MachineState

NAMES = [ArtifactName("a", 10, "aa"), ArtifactName("b", 20, "bb")]
OUTPUT = {"file": "output-0-0.bin", "dtype": "float32", "shape": [1], "sha256": "0"}
LOADED = {
    "kind": "loaded",
    "artifact": 0,
    "load_s": 0.5,
    "first_inference_s": 0.25,
    "idle_memory_bytes": 1000,
    "threads": 1,
    "can_set_threads": True,
    "outputs": [OUTPUT],
}
RUNTIME = {
    "kind": "runtime",
    "form": "pte",
    "name": "executorch",
    "version": "1.4",
    "debug_build": False,
    "operators": ["aten::mul.out"],
    "machine": "aarch64",
}
WARM = {"kind": "warm", "artifact": 0, "warmup_runs": 7, "settled": True}
STATE = {"kind": "state", "state": dataclasses.asdict(MachineState(uptime_s=1.0))}
MEASURED = {"kind": "measured", "artifact": 0, "peak_memory_bytes": 5000, "page_faults": 0.5}
FAILED = {"kind": "failed", "artifact": 1, "reason": "no kernel"}


def round_(done: int, *times_s: list[float], turn_runs: int = 2) -> dict[str, Any]:
    samples_s = {str(index): times for index, times in enumerate(times_s)}
    told = {"kind": "round", "done": done, "rounds": 9, "turn_runs": turn_runs}
    return {**told, "samples_s": samples_s}


EVENTS = [RUNTIME, LOADED, WARM, STATE, round_(1, [1.0], [2.0]), MEASURED, FAILED, {"kind": "end"}]


@pytest.mark.parametrize("told", EVENTS, ids=lambda told: told["kind"])
def test_what_the_runner_tells_is_believed(told: dict[str, Any]) -> None:
    assert checked(json.loads(json.dumps(told)), 2) == told


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({}, "no known kind"),
        ({"kind": ["end"]}, "no known kind"),
        ({"kind": "job"}, "no known kind"),
        ({**LOADED, "artifact": 2}, "of a model that it was not given"),
        ({**LOADED, "artifact": -1}, "'loaded' without a valid 'artifact'"),
        ({**LOADED, "artifact": True}, "'loaded' without a valid 'artifact'"),
        ({**LOADED, "load_s": float("nan")}, "without a valid 'load_s'"),
        ({**LOADED, "threads": 0}, "without a valid 'threads'"),
        ({**LOADED, "idle_memory_bytes": 10**30}, "without a valid 'idle_memory_bytes'"),
        ({**LOADED, "outputs": [{**OUTPUT, "file": "/root/.bashrc"}]}, "another name than its own"),
        (
            {**LOADED, "outputs": [{**OUTPUT, "file": "../output-0-0.bin"}]},
            "another name than its own",
        ),
        ({**LOADED, "outputs": [{**OUTPUT, "shape": [-1]}]}, "without a valid 'outputs'"),
        ({**LOADED, "outputs": [{**OUTPUT, "shape": "1"}]}, "without a valid 'outputs'"),
        ({**LOADED, "outputs": [{}]}, "without a valid 'outputs'"),
        ({**RUNTIME, "operators": [1]}, "without a valid 'operators'"),
        ({**RUNTIME, "version": None}, "without a valid 'version'"),
        ({**WARM, "settled": 1}, "without a valid 'settled'"),
        ({"kind": "state", "state": {"rm": 1}}, "without a valid 'state'"),
        (
            {"kind": "state", "state": {**STATE["state"], "busy_s": ["1"]}},  # type: ignore[dict-item]
            "without a valid 'state'",
        ),
        (round_(1, [1.0]), "of other models than it was given"),
        (round_(1, [1.0], [1.0], [1.0]), "of other models than it was given"),
        (round_(1, [1.0], [1.0, 2.0]), "unequal numbers of times"),
        (round_(1, [], []), "none of its own job"),
        (round_(1, [1.0] * 3, [1.0] * 3), "none of its own job"),
        (round_(10, [1.0], [1.0]), "none of its own job"),
        (round_(1, [0.0], [1.0]), "without a valid 'samples_s'"),
        (round_(1, [-1.0], [1.0]), "without a valid 'samples_s'"),
        (round_(1, [float("inf")], [1.0]), "without a valid 'samples_s'"),
        ({**round_(1, [1.0], [1.0]), "samples_s": [[1.0], [1.0]]}, "without a valid 'samples_s'"),
        ({**round_(1, [1.0], [1.0]), "turn_runs": 0}, "without a valid 'turn_runs'"),
        ({**FAILED, "reason": None}, "without a valid 'reason'"),
    ],
)
def test_what_no_runner_tells_is_not_believed(told: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(told, 2)
    with pytest.raises(ValueError, match=message):
        Record(NAMES, 1).take(event(**told))


def filled(**settings: Any) -> Record:
    record = Record(NAMES, 1, round_id="r", **settings)
    other = {**LOADED, "artifact": 1, "outputs": []}
    for told in (RUNTIME, LOADED, other, WARM, {**WARM, "artifact": 1}):
        assert record.take(event(**told)) == told
    return record


def test_rounds_add_up_to_measurements() -> None:
    record = filled()
    assert record.measurements == ()
    record.take(event(**round_(1, [1.0, 2.0], [3.0, 4.0])))
    record.take(event(**round_(2, [5.0, 6.0], [7.0, 8.0])))
    record.take(event(**MEASURED))
    first, second = record.measurements
    assert (first.samples_s, second.samples_s) == ((1.0, 2.0, 5.0, 6.0), (3.0, 4.0, 7.0, 8.0))
    assert (first.name, first.warmup_runs, first.settled, first.threads) == ("a", 7, True, 1)
    assert (first.round_id, first.turn_runs) == ("r", 2)
    assert first.file is not None
    assert (first.file.sha256, first.file.load_s, first.file.size_bytes) == ("aa", 0.5, 10)
    assert (first.file.model_memory_bytes, first.file.page_faults) == (4000, 0.5)
    assert second.file is not None
    assert second.file.peak_memory_bytes is None
    assert record.rounds == (2, 9)


def test_other_lines_are_taken_for_nothing() -> None:
    record = filled()
    assert record.take("WARNING: linker: unsupported flags") is None
    assert record.take(event(**round_(1, [1.0], [1.0]))[:-1]) is None
    assert record.measurements == ()


def earlier(runs: int) -> dict[str, Any]:
    record = filled()
    for done in range(1, runs // 2 + 1):
        record.take(event(**round_(done, [done + 0.25, done + 0.5], [done + 0.25, done + 0.5])))
    if runs % 2:
        record.take(event(**round_(runs // 2 + 1, [9.0], [9.0])))
    return {m.name: m for m in record.measurements}


def test_an_earlier_run_s_whole_rounds_are_gone_on_with() -> None:
    # Its last round was a short one, which is made again.
    record = filled(earlier=earlier(5))
    assert record.runs_before == 5
    record.take(event(**round_(3, [6.0], [7.0])))
    assert [m.samples_s for m in record.measurements] == [
        (1.25, 1.5, 2.25, 2.5, 6.0),
        (1.25, 1.5, 2.25, 2.5, 7.0),
    ]


def test_a_device_that_is_lost_before_it_goes_on_has_what_the_earlier_run_had() -> None:
    before = earlier(4)
    assert Record(NAMES, 1, earlier=before).measurements == tuple(before.values())
    # Loaded again for the comparison of outputs, and lost before it was warm.
    loaded = Record(NAMES, 1, earlier=before)
    loaded.take(event(**LOADED))
    assert loaded.measurements == tuple(before.values())
    # Nothing was left to do: its rounds stay rounds.
    assert filled(earlier=before).measurements == tuple(before.values())


def test_models_of_which_one_is_new_are_all_measured_from_the_beginning() -> None:
    assert Record(NAMES, 1, earlier={"a": earlier(4)["a"]}).runs_before == 0


def test_what_a_device_calls_itself_cannot_command_a_terminal() -> None:
    record = filled()
    record.take(event(**{**RUNTIME, "name": "\x1b[2Jtorch", "version": "1\n2"}))
    record.take(event(**{**FAILED, "reason": "bad\x07 \x9b31m" + "x" * 1000 + "."}))
    assert record.runtimes[-1]["name"] == "\ufffd[2Jtorch"
    assert record.runtimes[-1]["version"] == "1 2"
    assert record.failed is not None
    assert record.failed[1].isprintable()
    assert len(record.failed[1]) < 400


@pytest.mark.parametrize(
    ("can", "threads", "text"),
    [
        (True, 1, None),
        (False, 1, None),
        (False, 4, "executorch ran on 4 threads and cannot be told to run on 1"),
        (False, None, "executorch ran on as many threads as it likes and cannot be told"),
    ],
)
def test_threads_that_are_not_as_asked_are_a_caution(
    can: bool, threads: int | None, text: str | None
) -> None:
    record = Record(NAMES[:1], 1)
    record.take(event(**RUNTIME))
    record.take(event(**{**LOADED, "can_set_threads": can, "threads": threads}))
    found = [caution for caution in record.cautions(emulated=None) if caution.kind == "threads"]
    assert [text is not None and caution.text.startswith(text) for caution in found] == (
        [] if text is None else [True]
    )


def test_an_emulated_device_and_a_debug_build_are_cautions() -> None:
    record = filled()
    record.take(event(**{**RUNTIME, "debug_build": True}))
    assert {c.kind for c in record.cautions(emulated=True)} == {"debug-build", "emulated"}


def test_runs_of_an_earlier_run_are_a_caution() -> None:
    def found(record: Record) -> list[str]:
        return [c.text for c in record.cautions(emulated=None) if c.kind == "resumed"]

    assert found(filled()) == []
    (text,) = found(filled(earlier=earlier(4)))
    assert text.startswith("the first 4 runs of each are an earlier run's (--resume)")
