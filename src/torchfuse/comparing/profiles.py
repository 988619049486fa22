"""Where the time of a row's runs goes, operator by operator, as its runtime says."""

from collections.abc import Sequence

from torchfuse.comparing.jobs import Place, Subject
from torchfuse.comparison import FOLDED
from torchfuse.profiling import Profile, profile
from torchfuse.targets import target_for

__all__ = ["profiled", "worth_profiling"]

_WARMUP, _RUNS = 2, 10


def worth_profiling(places: Sequence[Place]) -> list[Place]:
    """Return those in eager mode, and the files whose own runtime says what takes how long.

    TorchScript runs eager mode's operators, and channels_last is eager mode.
    """
    return [place for place in places if place.target == "eager" or _has_its_own(place)]


def _has_its_own(place: Place) -> bool:
    if place.path is None:
        return False
    target = target_for(place.path)
    return target.quantized_by != "torch.ao" and target.profile_obstacle() is None


def profiled(place: Place, subject: Subject, threads: int) -> Profile:
    """Return the profile of some runs of a row on this machine.

    Raises:
        TorchfuseError: the runtime keeps none.
    """
    what = f"{place.target} {place.precision}"
    return profile(
        place.path or subject.module(place.variant),
        subject.examples[0],
        name=what if place.variant == FOLDED else f"{what}, {place.variant}",
        warmup=_WARMUP,
        runs=_RUNS,
        threads=threads,
    )
