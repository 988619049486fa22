"""The loop that warms up and gives every variant its turns, on a clock of the test's own."""

import contextlib
import mmap
import os
from collections.abc import Sequence

import pytest

from torchfuse.runner.loop import (
    LONGEST_WARMUP_S,
    Turns,
    interleave,
    timed,
    turn_length,
    warm_up,
)


def test_a_warm_up_of_a_given_length_is_that_long_and_says_nothing_of_settling() -> None:
    calls: list[int] = []

    def call() -> float:
        calls.append(1)
        return 1.0

    assert warm_up(call, 3) == (3, None)
    assert warm_up(call, 0) == (0, None)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("times_s", "ended"),
    [
        ([0.001] * 100, (10, True)),  # a minimum, however steady
        ([0.010] * 7 + [0.001] * 100, (15, True)),  # slow first calls
        ([LONGEST_WARMUP_S] * 100, (10, True)),  # the minimum comes before the longest time
        ([0.1 * 1.2**n for n in range(100)], (11, False)),  # gives up on one that never settles
    ],
)
def test_a_warm_up_lasts_until_two_windows_of_calls_agree(
    times_s: Sequence[float], ended: tuple[int, bool]
) -> None:
    assert warm_up(iter(times_s).__next__, None) == ended


@pytest.mark.parametrize(
    ("variants", "runs", "length"),
    [(1, 20, 1), (1, 1000, 10), (2, 1, 1), (2, 15, 1), (2, 50, 3), (2, 75, 5), (9, 10_000, 5)],
)
def test_a_turn_is_short_enough_for_fifteen_rounds(variants: int, runs: int, length: int) -> None:
    assert turn_length(variants, runs) == length


def _turns(names: str, log: list[str]) -> dict[str, object]:
    def turn_named(name: str) -> object:
        def turn(untimed: int, timed: int) -> list[float]:
            log.append(name)
            return [float(untimed + n) for n in range(timed)]

        return turn

    return {name: turn_named(name) for name in names}


def test_every_variant_has_a_turn_in_each_round_in_an_order_that_changes() -> None:
    log: list[str] = []
    rounds = list(interleave(_turns("abc", log), 50, seed=0))  # type: ignore[arg-type]
    assert [(done, of) for done, of, _ in rounds] == [(n, 17) for n in range(1, 18)]
    orders = {"".join(log[i : i + 3]) for i in range(0, len(log), 3)}
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(orders) > 1
    assert [len(taken["a"]) for _, _, taken in rounds] == [3] * 16 + [2]
    assert rounds[0][2]["a"] == [3.0, 4.0, 5.0]  # after three calls that are not timed
    assert list(rounds[0][2]) == ["a", "b", "c"]


def test_rounds_that_were_had_are_left_out_and_the_order_goes_on_as_it_would_have() -> None:
    whole: list[str] = []
    rest: list[str] = []
    list(interleave(_turns("abc", whole), 20, seed=7))  # type: ignore[arg-type]
    rounds = list(interleave(_turns("abc", rest), 20, seed=7, rounds_done=5))  # type: ignore[arg-type]
    assert rounds[0][0] == 6
    assert rest == whole[15:]
    assert not list(interleave(_turns("a", []), 5, seed=0, rounds_done=5))  # type: ignore[arg-type]


def test_the_calls_of_a_turn_can_be_said() -> None:
    (_, rounds, taken), *_ = interleave(_turns("ab", []), 10, 0, calls=(8, 5))  # type: ignore[arg-type]
    assert (rounds, taken["b"]) == (2, [8.0, 9.0, 10.0, 11.0, 12.0])


def test_a_call_is_timed_by_the_clock_before_and_after_it() -> None:
    clock = iter([1.0, 1.5, 3.0, 5.0]).__next__
    called: list[int] = []
    call = timed(lambda: called.append(1), clock)
    assert (call(), call(), len(called)) == (0.5, 2.0, 2)


def test_of_a_turn_only_the_timed_calls_are_kept() -> None:
    assert Turns(iter([1.0, 2.0, 3.0, 4.0]).__next__)(2, 2) == [3.0, 4.0]


def test_page_faults_of_the_timed_calls_are_counted() -> None:
    size, page = 40 << 20, os.sysconf("SC_PAGE_SIZE")

    def touch() -> float:
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)  # of which one fault brings in 2 MiB
        memory[::page] = bytes(size // page)
        return 1.0

    turns = Turns(touch)
    assert turns.page_faults == 0
    turns(1, 2)
    assert turns.page_faults >= size // page
