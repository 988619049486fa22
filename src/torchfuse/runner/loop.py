"""The measuring loop: warm-up, and rounds in which every variant has a turn."""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from resource import RUSAGE_SELF, getrusage
from typing import Any

__all__ = [
    "LONGEST_WARMUP_S",
    "Clock",
    "Turn",
    "Turns",
    "interleave",
    "timed",
    "turn_length",
    "warm_up",
]

Clock = Callable[[], float]  # seconds since any fixed moment
Turn = Callable[[int, int], Sequence[float]]  # calls untimed, calls timed: the time of each, in s

# Warm-up ends when two windows of calls agree. Lazy initialisation, the allocator and the
# frequency governor take their first few calls; a machine that never settles gets a caution.
_SETTLING_WINDOW = 5
_SETTLED_WITHIN = 0.05
LONGEST_WARMUP_S = 3.0

# MobileNetV2 in int8 takes 20 % longer on its first call after another model's; most of that is
# gone after three.
_UNTIMED_IN_A_TURN = 3
_TIMED_IN_A_TURN = 5  # at most
# Between turns a worker waits to be told, and its next call is a little slower: 1 % of 3 ms.
_TIMED_ALONE = 10  # at most
_ROUNDS = 15  # at least, where there are enough runs: they are what an interval is made of


def warm_up(call: Callable[[], float], count: int | None) -> tuple[int, bool | None]:
    """Make `count` calls, or (None) calls until the times settle; return how many, and whether.

    `call` returns the seconds that it took. Nobody looked whether they settled where a count was
    given: then that is None.
    """
    if count is not None:
        for _ in range(count):
            call()
        return count, None
    times: list[float] = []
    while not _settled(times):
        if sum(times) > LONGEST_WARMUP_S and len(times) >= 2 * _SETTLING_WINDOW:
            return len(times), False
        times.append(call())
    return len(times), True


def _settled(times: list[float]) -> bool:
    if len(times) < 2 * _SETTLING_WINDOW:
        return False
    before = statistics.median(times[-2 * _SETTLING_WINDOW : -_SETTLING_WINDOW])
    now = statistics.median(times[-_SETTLING_WINDOW:])
    return abs(now - before) <= _SETTLED_WITHIN * before


def turn_length(variants: int, runs: int) -> int:
    """Return how many timed calls a variant makes in a row."""
    most = _TIMED_ALONE if variants == 1 else _TIMED_IN_A_TURN
    return max(1, min(most, runs // _ROUNDS))


def interleave(
    turns: Mapping[str, Turn],
    runs: int,
    seed: int,
    rounds_done: int = 0,
    calls: tuple[int, int] | None = None,
) -> Iterator[tuple[int, int, dict[str, list[float]]]]:
    """Give every variant a turn in each round, in random order, until each has `runs` samples.

    What slows the machine down for a while so slows all of them. A turn is a few calls that are
    not timed, since the variant before has pushed this one's weights out of the caches, and a few
    that are. After each round: how many are done, of how many, and the new samples in seconds.
    `rounds_done` are left out, since an earlier run had them; `calls`, untimed and timed, are what
    a turn is made of where that is not the usual.
    """
    usual = (0 if len(turns) == 1 else _UNTIMED_IN_A_TURN, turn_length(len(turns), runs))
    untimed, length = usual if calls is None else calls
    order = random.Random(seed)  # noqa: S311  # an order, not a secret
    rounds = math.ceil(runs / length)
    for done in range(1, rounds + 1):
        timed = min(length, runs - (done - 1) * length)
        names = order.sample(list(turns), len(turns))
        if done <= rounds_done:
            continue
        taken = {name: list(turns[name](untimed, timed)) for name in names}
        yield done, rounds, {name: taken[name] for name in turns}


def timed(call: Callable[[], Any], clock: Clock = time.perf_counter) -> Callable[[], float]:
    """Return a call that returns how many seconds it took."""

    def measured() -> float:
        start = clock()
        call()
        return clock() - start

    return measured


class Turns:
    """The turns of a call that returns how many seconds it took; page faults are counted."""

    def __init__(self, call: Callable[[], float]) -> None:
        self._call = call
        self._faults = self._calls = 0

    def __call__(self, untimed: int, timed: int) -> list[float]:
        """Take a turn; return the seconds of the timed calls."""
        for _ in range(untimed):
            self._call()
        before = getrusage(RUSAGE_SELF).ru_minflt
        samples_s = [self._call() for _ in range(timed)]
        self._faults += getrusage(RUSAGE_SELF).ru_minflt - before
        self._calls += timed
        return samples_s

    @property
    def page_faults(self) -> float:
        """How many minor ones a timed call had, on average."""
        return self._faults / max(1, self._calls)
