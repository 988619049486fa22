"""Measurements as files, exactly."""

import csv
import io
import json
import sys
from dataclasses import replace

from torchfuse.devices.facts import DeviceFacts
from torchfuse.devices.run import DeviceRun
from torchfuse.measuring.cautions import Caution
from torchfuse.measuring.timing import FileFacts, Measurement
from torchfuse.render.bench_files import earlier_runs, to_csv, to_json, to_markdown
from torchfuse.verifying.equivalence import Equivalence, OutputDifference

FILE = FileFacts(2_000_000, "ab12", 0.01, 0.02, 100, 200)
FAST = Measurement("fast.pte", (1.0,) * 6, 12, True, 1, round_id="r", file=FILE)
SLOW = replace(FAST, name="slow|er.pt", samples_s=(2.0,) * 6)
PHONE = DeviceFacts("adb:A1", "ready", model="Pixel 8", architecture="aarch64", governors=("walt",))
EQUAL = Equivalence((OutputDifference("output", 0.0, 0.0, float("inf"), passed=True),))
RUN = DeviceRun(
    PHONE,
    "executor_runner",
    (SLOW, FAST),
    (Caution("governor", "it moves; fix it", fails=False),),
    (("fast.pte", EQUAL),),
)
SETTINGS = {"inputs": "1,3,224,224", "runs": 6}


def test_json_holds_every_sample_every_ratio_and_every_fact() -> None:
    report = json.loads(to_json([RUN], versions={"torch": "2.13.0"}, settings=SETTINGS))
    assert (report["versions"], report["settings"]) == ({"torch": "2.13.0"}, SETTINGS)
    (run,) = report["runs"]
    assert run["device"]["model"] == "Pixel 8"
    assert run["device"]["governors"] == ["walt"]
    assert [result["name"] for result in run["results"]] == ["slow|er.pt", "fast.pte"]
    assert run["results"][0]["samples_s"] == [2.0] * 6
    assert run["results"][0]["median_s"] == 2.0
    assert run["results"][0]["file"]["sha256"] == "ab12"
    assert run["times_as_fast"] == [
        {
            "fastest": "fast.pte",
            "other": "slow|er.pt",
            "value": 2.0,
            "low": 2.0,
            "high": 2.0,
            "confidence": 0.95,
            "measurable": True,
        }
    ]
    assert run["cautions"][0]["kind"] == "governor"
    assert run["differences_from_this_machine"]["fast.pte"]["sqnr_db"] == sys.float_info.max


def test_an_interrupted_run_is_read_back_as_it_was() -> None:
    text = to_json([RUN], versions={"torch": "2.13"}, settings=SETTINGS)
    settings, runs = earlier_runs(text)
    assert settings == {**SETTINGS, "versions": {"torch": "2.13"}}
    assert runs == {"adb:A1": {"slow|er.pt": SLOW, "fast.pte": FAST}}


def test_json_of_nothing_measured_yet_is_whole() -> None:
    assert json.loads(to_json([], versions={}, settings={})) == {
        "versions": {},
        "settings": {},
        "runs": [],
    }


def test_csv_has_a_row_a_measurement_in_seconds_and_bytes() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv([RUN]))))
    assert [row["name"] for row in rows] == ["slow|er.pt", "fast.pte"]
    assert rows[1]["device"] == "adb:A1"
    assert rows[1]["median_s"] == "1.0"
    assert rows[1]["size_bytes"] == "2000000"
    assert rows[1]["runs"] == "6"


def test_markdown_has_a_table_a_device_with_ratios_to_the_fastest() -> None:
    assert (
        to_markdown([RUN])
        == """\
adb:A1: Pixel 8, aarch64

| model | median | IQR | p5 … p95 | times as long as the fastest | load | size |
|---|---:|---:|---:|---:|---:|---:|
| fast.pte | 1.00 s | 0.00 s | 1.00 s … 1.00 s | 1 | 10.00 ms | 2.00 MB |
| slow\\|er.pt | 2.00 s | 0.00 s | 2.00 s … 2.00 s | 2.00 (2.00 … 2.00) | 10.00 ms | 2.00 MB |

- it moves; fix it.
"""
    )


def test_markdown_of_a_run_that_ended_early_says_so() -> None:
    lost = DeviceRun(PHONE, None, (), error="adb:A1: the device was lost.")
    assert "Ended early: adb:A1: the device was lost." in to_markdown([lost])
