"""The measuring loop, with a clock that the test drives, and on real models."""

import gc
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from torchfuse.errors import InputError, UnsupportedError
from torchfuse.exporting.model_files import load
from torchfuse.measuring.timing import Measurement, measure, measure_interleaved, ratio
from torchfuse.runner import workers
from torchfuse.targets.executorch import program

X = torch.ones(1, 4)


class FakeClock:
    """A clock that only moves when something takes time."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def taking(self, *times_s: float) -> Callable[[torch.Tensor], None]:
        """A model whose n-th call takes the n-th of these times, and every later one the last."""
        remaining = list(times_s)

        def model(_x: torch.Tensor) -> None:
            self.now_s += remaining.pop(0) if len(remaining) > 1 else remaining[0]

        return model


def test_each_call_is_one_sample_in_the_order_of_the_calls() -> None:
    clock = FakeClock()
    model = clock.taking(9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 100.0)
    measured = measure(model, X, name="m", warmup=2, runs=5, clock=clock)
    assert replace(measured, cautions=()) == Measurement(
        "m",
        (1.0, 2.0, 3.0, 4.0, 100.0),
        2,
        settled=None,
        threads=1,
        page_faults=measured.page_faults,
    )
    assert measured.runs == 5
    assert measured.median_s == 3.0
    assert measured.iqr_s == 2.0
    assert (measured.min_s, measured.max_s, measured.mean_s) == (1.0, 100.0, 22.0)
    assert measured.p5_s == pytest.approx(1.2)
    assert measured.p95_s == pytest.approx(80.8)
    assert measured.calls_per_s == pytest.approx(1 / 3)


def test_warm_up_goes_on_until_five_calls_take_what_the_five_before_took() -> None:
    clock = FakeClock()
    slow_start = [0.5, 0.4, 0.3, 0.2, 0.2, 0.1]
    measured = measure(clock.taking(*slow_start), X, runs=3, clock=clock)
    assert measured.settled
    assert measured.warmup_runs == 13  # calls 4 to 8 have the median of calls 9 to 13
    assert measured.samples_s == pytest.approx((0.1, 0.1, 0.1))


def test_steady_times_are_still_warmed_up_ten_times() -> None:
    clock = FakeClock()
    assert measure(clock.taking(0.001), X, runs=1, clock=clock).warmup_runs == 10


def test_times_that_never_settle_end_the_warm_up_after_three_seconds_with_a_caution() -> None:
    clock = FakeClock()
    measured = measure(clock.taking(*[0.1 * 1.1**i for i in range(60)]), X, runs=3, clock=clock)
    assert not measured.settled
    (caution,) = [c for c in measured.cautions if c.kind == "unsettled"]
    assert caution.text.startswith("the times had not settled after 15 warm-up runs; ")


def test_cautions_are_those_of_the_run_and_of_the_variant_itself() -> None:
    clock = FakeClock()
    wide, narrow = [1.0, 1.0, 2.0, 2.0] * 10, [1.0]
    variants = {"wide": clock.taking(*wide), "narrow": clock.taking(*narrow)}
    measured = measure_interleaved(variants, X, warmup=0, runs=30, threads=1, clock=clock)
    assert {c.name for c in measured["wide"].cautions if c.kind == "spread"} == {"wide"}
    assert not [c for c in measured["narrow"].cautions if c.name == "wide"]


def test_variants_have_a_turn_a_round_in_an_order_that_changes() -> None:
    called: list[str] = []
    clock = FakeClock()

    def variant(name: str) -> Callable[[torch.Tensor], None]:
        def model(_x: torch.Tensor) -> None:
            called.append(name)
            clock.now_s += 1.0

        return model

    names = ["a", "b", "c"]
    measured = measure_interleaved(
        {name: variant(name) for name in names}, X, warmup=0, runs=100, clock=clock
    )
    turns = [tuple(called[i : i + 8]) for i in range(0, len(called), 8)]
    assert all(len(set(turn)) == 1 for turn in turns)  # three calls untimed, five timed
    rounds = [tuple(turn[0] for turn in turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert len(rounds) == 20
    assert all(sorted(round_) == names for round_ in rounds)
    assert len(set(rounds)) == 6  # every order occurs
    assert {name: m.runs for name, m in measured.items()} == {"a": 100, "b": 100, "c": 100}
    assert list(measured) == names


@pytest.mark.parametrize("runs", [1, 4, 5, 7, 12, 31])
def test_there_are_as_many_samples_as_runs_also_where_they_do_not_fill_a_turn(runs: int) -> None:
    clock = FakeClock()
    variants = {"a": clock.taking(1.0), "b": clock.taking(2.0)}
    measured = measure_interleaved(variants, X, warmup=0, runs=runs, clock=clock)
    assert measured["a"].samples_s == (1.0,) * runs
    assert measured["b"].samples_s == (2.0,) * runs
    assert ratio(measured["b"], measured["a"]).value == 2.0


def test_calls_right_after_another_variant_are_not_timed() -> None:
    clock = FakeClock()
    last = ""

    def variant(name: str) -> Callable[[torch.Tensor], None]:
        def model(_x: torch.Tensor) -> None:
            nonlocal last
            clock.now_s += 1.0 if last == name else 9.0
            last = name

        return model

    measured = measure_interleaved(
        {"a": variant("a"), "b": variant("b")}, X, warmup=0, runs=10, clock=clock
    )
    assert measured["a"].samples_s == measured["b"].samples_s == (1.0,) * 10


def test_a_slow_moment_in_some_rounds_does_not_hide_a_difference() -> None:
    clock = FakeClock()
    rounds = {"n": 0}

    def variant(factor: float) -> Callable[[torch.Tensor], None]:
        def model(_x: torch.Tensor) -> None:
            clock.now_s += factor * (3.0 if rounds["n"] % 2 else 1.0)

        return model

    def next_round(done: int, _all: int) -> None:
        rounds["n"] = done

    variants = {"before": variant(1.1), "after": variant(1.0)}
    measured = measure_interleaved(variants, X, warmup=0, runs=40, clock=clock, on_round=next_round)
    speed_up = ratio(measured["before"], measured["after"])
    assert speed_up.measurable
    assert speed_up.value == pytest.approx(1.1)


def test_measurements_of_separate_runs_are_not_taken_for_pairs() -> None:
    clock = FakeClock()
    a = measure(clock.taking(1.0), X, warmup=0, runs=3, clock=clock)
    b = measure(clock.taking(2.0), X, warmup=0, runs=4, clock=clock)
    assert ratio(b, a).value == 2.0


def test_progress_is_told_after_every_round() -> None:
    told: list[tuple[int, int]] = []
    measure_interleaved(
        {"m": nn.Identity()}, X, runs=3, on_round=lambda done, total: told.append((done, total))
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_the_measurements_so_far_are_given_after_every_round() -> None:
    clock = FakeClock()
    given: list[dict[str, Measurement]] = []
    variants = {"a": clock.taking(1.0), "b": clock.taking(3.0)}
    measured = measure_interleaved(
        variants, X, warmup=0, runs=32, clock=clock, on_partial=given.append
    )
    assert [so_far["b"].runs for so_far in given] == [*range(2, 32, 2), 32]
    assert given[-1] == {name: replace(m, cautions=()) for name, m in measured.items()}


def test_models_run_in_inference_mode_on_one_thread_with_no_garbage_collection() -> None:
    seen: list[tuple[bool, int, bool]] = []

    def model(x: torch.Tensor) -> None:
        seen.append((torch.is_inference_mode_enabled(), torch.get_num_threads(), gc.isenabled()))

    before = torch.get_num_threads()
    measure(model, X, warmup=0, runs=1)
    measure(model, X, warmup=0, runs=1, threads=2)
    assert seen == [(True, 1, False), (True, 2, False)]
    assert torch.get_num_threads() == before
    assert gc.isenabled()


def test_threads_are_as_before_also_after_an_error() -> None:
    before = torch.get_num_threads()
    during: list[int] = []

    def failing(_x: torch.Tensor) -> None:
        during.append(torch.get_num_threads())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure(failing, X, threads=before + 1)
    assert during == [before + 1]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [(X, "positional"), ((X,), "positional"), ({"x": X}, "keyword")],
    ids=["tensor", "tuple", "dict"],
)
def test_one_case_is_a_tensor_a_tuple_or_a_dict(inputs: object, expected: str) -> None:
    got: list[str] = []

    def model(*args: torch.Tensor, **kwargs: torch.Tensor) -> None:
        got.append("keyword" if kwargs else "positional")

    measure(model, inputs, warmup=0, runs=1)
    assert got == [expected]


def test_a_measurement_survives_json_with_every_sample() -> None:
    measured = measure(nn.Linear(4, 4), X, runs=5)
    assert Measurement.from_json(measured.to_json()) == measured


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"runs": 0}, r"^runs must be 1 or more, got 0\.$"),
        ({"threads": 0}, r"^threads must be 1 or more, got 0\.$"),
        ({"warmup": -1}, r"^warmup must be zero or more, got -1\.$"),
    ],
)
def test_impossible_counts_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure(nn.Identity(), X, **arguments)


def test_several_cases_are_refused_since_a_time_belongs_to_one_input() -> None:
    with pytest.raises(InputError, match="got 2 cases; measure each on its own"):
        measure(nn.Identity(), [X, X])


def test_no_variants_are_refused() -> None:
    with pytest.raises(InputError, match="at least one variant"):
        measure_interleaved({}, X)


@pytest.mark.parametrize("name", ["third.pt", "third.ptl", "third.pte"])
def test_a_path_is_measured_under_its_file_name_in_a_process_of_its_own(
    model_files: Callable[[str], str], name: str
) -> None:
    x = torch.ones(1, 3, 4, 4)
    measured = measure(model_files(name), x, runs=3)
    assert (measured.name, measured.runs, measured.threads) == (name, 3, 1)
    assert measured.file is not None
    assert measured.file.size_bytes == os.path.getsize(model_files(name))
    assert measured.file.load_s is not None
    assert measured.file.first_inference_s is not None
    assert measured.file.model_memory_bytes is not None
    assert "in this process" not in str(measured)


def test_a_live_callable_is_labelled_as_measured_in_this_process() -> None:
    measured = measure(nn.Identity(), X, runs=3)
    assert measured.file is None
    assert str(measured).endswith(", in this process")


def test_files_and_live_callables_have_turns_in_the_same_rounds(
    model_files: Callable[[str], str],
) -> None:
    x = torch.ones(1, 3, 4, 4)
    variants = {"file": model_files("third.pt"), "live": load(model_files("third.pt"))}
    measured = measure_interleaved(variants, x, runs=20, warmup=1)
    assert measured["file"].round_id == measured["live"].round_id
    assert [m.runs for m in measured.values()] == [20, 20]


@pytest.mark.parametrize(
    "inputs",
    [
        {"x": torch.ones(1, 2, 3, 4), "y": torch.ones(5)},
        (torch.ones(1, 2, 3, 4).contiguous(memory_format=torch.channels_last), torch.ones(5)),
        (torch.ones(2, 0), torch.ones(())),
    ],
    ids=["keywords", "channels_last", "empty and scalar"],
)
def test_inputs_reach_a_process_as_they_are(
    model_files: Callable[[str], str], inputs: object
) -> None:
    assert measure(model_files("sum.pt"), inputs, runs=2, warmup=0).runs == 2


def test_an_input_that_no_process_can_be_given_is_refused(
    model_files: Callable[[str], str],
) -> None:
    sparse = torch.ones(3, 3).to_sparse()
    with pytest.raises(InputError, match=r"dense real inputs, got one of torch\.float32"):
        measure(model_files("sum.pt"), (sparse, torch.ones(1)), runs=2)


def test_a_process_that_ends_is_an_error_that_says_how(
    model_files: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = workers.Worker.ask
    of_other_tests = _descendants(os.getpid())

    def killed(worker: workers.Worker, do: str, **what: object) -> dict[str, object]:
        if do == "turn":
            for pid in _descendants(os.getpid()) - of_other_tests:
                os.kill(pid, signal.SIGSEGV)
        return ask(worker, do, **what)

    monkeypatch.setattr(workers.Worker, "ask", killed)
    with pytest.raises(UnsupportedError, match=r"third\.pt ran here, but not in a process of its"):
        measure(model_files("third.pt"), torch.ones(1, 3, 4, 4), runs=3)
    assert _descendants(os.getpid()) <= of_other_tests


def _descendants(pid: int) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found |= {int(entry.name), *_descendants(int(entry.name))}
    return found


def test_executorch_runs_on_the_threads_asked_for_and_on_its_own_afterwards(
    model_files: Callable[[str], str],
) -> None:
    model = load(model_files("third.pte"))
    before = program.threads()
    seen: list[int] = []

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.append(program.threads())
        result: torch.Tensor = model(x)
        return result

    x = torch.ones(1, 3, 4, 4)
    for threads in (before + 1, 1):
        measure(watched, x, warmup=0, runs=1, threads=threads)
    # A program that was loaded for another pool must follow, or it would wait for it for ever.
    assert torch.equal(model(x), x * 0.333333)
    assert seen == [before + 1, 1]
    assert program.threads() == before
