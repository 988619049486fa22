"""The time of a run, operator by operator: plain data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["Key", "OperatorTime", "Profile", "profile_of"]


@dataclass(frozen=True)
class OperatorTime:
    """What the calls of one operator take in a run."""

    operator: str
    calls: float  # in a run; not whole where the runs differ
    self_s: float  # in a run, without the operators that it called
    share: float  # of the run, 0 to 1
    in_delegate: bool = False  # whether it was run by a delegate, such as XNNPACK
    delegate: str | None = None  # which one; None: none, or the runtime does not say


@dataclass(frozen=True)
class Profile:
    """Where the time of a run goes. Profiling takes time too: compare shares, and not run times."""

    name: str
    operators: tuple[OperatorTime, ...]  # the most expensive first
    run_s: float  # a run, profiled, on average
    runs: int
    source: Literal["torch.profiler", "ETDump"]


Key = tuple[str, bool, str | None]  # of an OperatorTime: operator, in_delegate, delegate


def profile_of(
    name: str,
    total_s: Mapping[Key, float],
    calls: Mapping[Key, int],
    runs: int,
    source: Literal["torch.profiler", "ETDump"],
) -> Profile:
    """Return a profile from the time and the number of each operator's calls in all runs."""
    all_s = sum(total_s.values())
    operators = [
        OperatorTime(
            operator,
            calls[key] / runs,
            self_s / runs,
            self_s / all_s if all_s else 0.0,
            in_delegate,
            delegate,
        )
        for key, self_s in total_s.items()
        for operator, in_delegate, delegate in [key]
    ]
    operators.sort(key=lambda row: (-row.self_s, row.operator))
    return Profile(name, tuple(operators), all_s / runs, runs, source)
