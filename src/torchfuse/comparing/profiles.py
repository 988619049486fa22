"""Where the time of a row's runs goes, operator by operator, as its runtime says."""

from collections.abc import Callable, Sequence

from torchfuse.comparing.comparison import FOLDED
from torchfuse.comparing.jobs import ComparedModel, Place
from torchfuse.errors import TorchfuseError
from torchfuse.measuring.profiling import profile
from torchfuse.operator_times import Profile
from torchfuse.targets import target_for

__all__ = ["profiles"]

_WARMUP, _RUNS = 2, 10


def profiles(
    places: Sequence[Place], subject: ComparedModel, threads: int, on_step: Callable[[str], object]
) -> tuple[tuple[Profile, ...], list[str]]:
    """Return a profile of each row in eager mode or with a runtime that keeps one; and notes.

    It is taken on this machine. TorchScript runs eager mode's operators, and channels_last is eager
    mode: they have none.
    """
    found, notes = [], []
    worth = [place for place in places if place.target == "eager" or _has_its_own(place)]
    for number, place in enumerate(worth, 1):
        on_step(f"profiling, {number} of {len(worth)}")
        try:
            found.append(_profile(place, subject, threads))
        except TorchfuseError as error:  # the row is there all the same
            notes.append(f"there is no profile of {place}: {error}")
    return tuple(found), notes


def _has_its_own(place: Place) -> bool:
    if place.path is None:
        return False
    target = target_for(place.path)
    return target.quantized_by != "torch.ao" and target.profile_obstacle() is None


def _profile(place: Place, subject: ComparedModel, threads: int) -> Profile:
    what = f"{place.target} {place.precision}"
    return profile(
        place.path or subject.module(place.variant),
        subject.examples[0],
        name=what if place.variant == FOLDED else f"{what}, {place.variant}",
        warmup=_WARMUP,
        runs=_RUNS,
        threads=threads,
    )
