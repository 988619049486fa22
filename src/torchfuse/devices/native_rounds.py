"""Rounds of a native runner: in each, a process of its own for every model, in random order."""

import math
import time
from collections.abc import Callable, Mapping, Sequence

from torchfuse.devices.record import Record
from torchfuse.devices.runner import OnRound, Schedule
from torchfuse.devices.state import state_of
from torchfuse.devices.transport import Transport
from torchfuse.errors import DeviceError
from torchfuse.runner.loop import interleave

__all__ = ["time_in_rounds"]

_ROUNDS = 15  # at least, where there are enough runs
_FEWEST_TIMED = 5  # in a process, whose start takes longer than they do
_WARMUP = 10  # a process that has just begun is slow for a few calls

# untimed calls, timed calls, seconds left → seconds of each timed call
Turn = Callable[[int, int, float], Sequence[float]]


def time_in_rounds(
    transport: Transport,
    turns: Mapping[str, Turn],
    record: Record,
    schedule: Schedule,
    on_round: OnRound,
) -> None:
    """Have every model take its turns; the record takes the times round by round.

    Raises:
        DeviceError: a turn failed, or all together took too long.
    """
    timed = min(schedule.runs, max(_FEWEST_TIMED, math.ceil(schedule.runs / _ROUNDS)))
    untimed = _WARMUP if schedule.warmup is None else schedule.warmup
    deadline = time.monotonic() + schedule.timeout_s

    def before_deadline(turn: Turn) -> Callable[[int, int], Sequence[float]]:
        def taken(untimed: int, timed: int) -> Sequence[float]:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise DeviceError(
                    f"{transport.name}: the rounds took longer than the {schedule.timeout_s:g} s "
                    "of --timeout; give it more, or fewer runs (--iter)."
                )
            return turn(untimed, timed, left_s)

        return taken

    bounded = {name: before_deadline(turn) for name, turn in turns.items()}
    done_before = record.runs_before // timed
    for index in range(len(turns)):
        # Each process warms up for itself; how well shows in the spread.
        warm = {"kind": "warm", "artifact": index, "warmup_runs": untimed, "settled": None}
        record.note(warm)
    record.note_state(state_of(transport))
    for done, rounds, samples_s in interleave(
        bounded, schedule.runs, 0, done_before, (untimed, timed)
    ):
        record.note(
            {
                "kind": "round",
                "done": done,
                "rounds": rounds,
                "turn_runs": timed,
                "samples_s": {str(index): times for index, times in enumerate(samples_s.values())},
            }
        )
        on_round(record)
    record.note_state(state_of(transport))
