"""Measurements as text, exactly."""

from torchfuse.devices.facts import DeviceFacts
from torchfuse.devices.run import DeviceRun
from torchfuse.measuring.timing import FileFacts, Measurement
from torchfuse.render.bench_text import block, closing, heading


def measured(name: str, *samples_s: float, threads: int = 1) -> Measurement:
    return Measurement(name, samples_s, 12, settled=True, threads=threads, round_id="r")


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


def test_a_block_of_a_file_tells_load_first_inference_memory_and_size_apart() -> None:
    file = FileFacts(
        3_738_912,
        "ab",
        0.0087,
        0.0134,
        idle_memory_bytes=100_000_000,
        peak_memory_bytes=112_500_000,
    )
    shown = block(Measurement("m.pte", (0.001,) * 5, 12, True, 1, file=file))
    assert shown.splitlines()[3] == (
        "  Load: 8.70 ms    first inference: 13.40 ms    memory: 12.50 MB    file: 3.74 MB"
    )


def test_a_block_leaves_out_what_the_runner_does_not_tell() -> None:
    file = FileFacts(2000, "ab", None, None, None)
    shown = block(Measurement("m.ptl", (0.001,) * 5, None, None, None, file=file))
    assert shown.splitlines()[3:] == ["  File: 2.00 kB", "  5 runs, threads as the runner has them"]


def test_the_closing_sentence_says_for_which_processors_it_holds() -> None:
    slow, fast = measured("slow", *[2.0] * 20), measured("fast", *[1.0] * 20)
    phone = DeviceFacts("adb:A1", "ready", architecture="aarch64")
    assert closing([slow, fast], phone).splitlines()[0] == "fast ran, on aarch64,"


def test_the_heading_says_where_and_by_what() -> None:
    phone = DeviceFacts(
        "adb:A1", "ready", model="Pixel 8", soc="Tensor G3", architecture="aarch64", cores=9,
        system="Android 14 (API 34)", emulated=True,
    )  # fmt: skip
    assert heading(DeviceRun(phone, "executor_runner", ())) == (
        "On adb:A1: Pixel 8, Tensor G3, aarch64, 9 cores, Android 14 (API 34), emulated; "
        "measured by executor_runner"
    )
