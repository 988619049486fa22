"""Measurements as text and as JSON, exactly."""

import json

import pytest

from torchfuse.machine import Machine
from torchfuse.render.bench import block, closing, duration, to_json
from torchfuse.timing import Measurement


def measured(name: str, *samples_s: float, threads: int = 1) -> Measurement:
    return Measurement(name, samples_s, 12, settled=True, threads=threads, round_id="r")


@pytest.mark.parametrize(
    ("seconds", "like", "text"),
    [
        (1.5, None, "1.50 s"),
        (1.0, None, "1.00 s"),
        (0.9999, None, "999.90 ms"),
        (0.0123456, None, "12.35 ms"),
        (0.0000042, None, "4.20 µs"),
        (0.0000000042, None, "4.20 ns"),
        (0.0, None, "0.00 ns"),
        (0.0004, 0.0123, "0.40 ms"),
    ],
)
def test_a_time_has_the_unit_that_suits_it(seconds: float, like: float | None, text: str) -> None:
    assert duration(seconds, like) == text


def test_a_block_tells_centre_and_spread_in_one_unit() -> None:
    samples_s = [0.001 + 0.00001 * i for i in range(11)]
    assert block(measured("m.pte", *samples_s, threads=2)) == (
        "m.pte\n"
        "  Time (median ± IQR):   1.05 ms ± 0.05 ms    952.381 per second\n"
        "  Range (min … max):     1.00 ms … 1.10 ms    p5 … p95: 1.01 ms … 1.09 ms\n"
        "  11 runs after 12 warm-up runs, 2 threads"
    )


def test_the_closing_sentence_compares_the_fastest_with_each_other_one() -> None:
    slow = measured("slow.pt", *[2.0] * 20)
    fast = measured("fast.pte", *[1.0, 1.001] * 10)
    like_fast = measured("alike.pte", *[1.001, 1.0] * 10)
    assert closing([slow, fast, like_fast]) == (
        "fast.pte ran\n"
        "  with no measurable difference (95% interval 1.00 … 1.00) to alike.pte\n"
        "  2.00 times (95% interval 2.00 … 2.00) as fast as slow.pt"
    )


def test_json_holds_every_sample_and_every_ratio_to_the_fastest() -> None:
    machine = Machine("Some Processor", 2, None)
    slow, fast = measured("slow.pt", *[2.0] * 6), measured("fast.pte", *[1.0] * 6)
    report = json.loads(
        to_json([slow, fast], machine, versions={"torch": "2.13.0"}, inputs="1,3,224,224")
    )
    assert report["versions"] == {"torch": "2.13.0"}
    assert report["inputs"] == "1,3,224,224"
    assert report["machine"] == {
        "processor": "Some Processor",
        "logical_cpus": 2,
        "avx512_vnni": None,
    }
    assert [result["name"] for result in report["results"]] == ["slow.pt", "fast.pte"]
    assert report["results"][0]["samples_s"] == [2.0] * 6
    assert report["results"][0]["median_s"] == 2.0
    assert report["times_as_fast"] == [
        {
            "fastest": "fast.pte",
            "other": "slow.pt",
            "value": 2.0,
            "low": 2.0,
            "high": 2.0,
            "confidence": 0.95,
            "measurable": True,
        }
    ]


def test_json_of_nothing_measured_yet_is_whole() -> None:
    machine = Machine("Some Processor", 2, avx512_vnni=True)
    report = json.loads(to_json([], machine, versions={}, inputs=""))
    assert (report["results"], report["times_as_fast"]) == ([], [])
