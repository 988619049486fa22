"""What two suites, or two comparisons, say of the same: slower, larger, less accurate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torchfuse.comparing.comparison import LOCAL, Comparison
from torchfuse.errors import InputError
from torchfuse.stats import ratio_of_medians
from torchfuse.suites.results import Result, SuiteResult

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchfuse.comparing.comparison import Row
    from torchfuse.stats import Share

__all__ = ["Change", "Changes", "changes"]

Kind = Literal["slower", "larger", "less accurate", "faster", "smaller", "more accurate"]

_OF_SIZE = 0.001  # a file that is larger by less is as large: names and checksums differ in length


@dataclass(frozen=True)
class Change:
    """A row of which something surely is another than before."""

    kind: Kind
    name: str  # of the result
    form: str  # "fused, .pte int8, on local"
    before: float  # seconds, bytes, or a share
    after: float
    low: float | None  # of after over before, for times: the 95 % interval
    high: float | None


@dataclass(frozen=True)
class Changes:
    """What changed, the worse first, and what could not be compared."""

    changes: tuple[Change, ...]
    compared: int  # rows that both have
    notes: tuple[str, ...]  # sentences


_ORDER: tuple[Kind, ...] = (
    "less accurate", "slower", "larger", "more accurate", "faster", "smaller",
)  # fmt: skip


def changes(old: SuiteResult | Comparison, new: SuiteResult | Comparison) -> Changes:
    """Return what surely changed: what may be chance is left out.

    Times are compared where both were measured on the same machine or device, and differ where the
    95 % interval of their ratio leaves 1 out; accuracies differ where their intervals have nothing
    in common, or, without intervals, at all; sizes by more than 0.1 %.

    Raises:
        InputError: the two have nothing in common, or are no two of a kind.
    """
    if isinstance(old, SuiteResult) != isinstance(new, SuiteResult):
        raise InputError("Expected two suites or two comparisons, got one of each.")
    found: list[Change] = []
    notes: list[str] = []
    compared = 0
    for before, after in _pairs(_suite(old), _suite(new), notes):
        assert before.comparison is not None
        assert after.comparison is not None
        not_here = _elsewhere(before, after, notes)
        for row in after.comparison.rows:
            earlier = before.comparison.find(row.variant, row.target, row.precision, row.device)
            if earlier is None:
                notes.append(f"{after.name}: {_form(row)} is new.")
                continue
            compared += 1
            found += _changes(after.name, earlier, row, row.device not in not_here, notes)
        notes += [
            f"{after.name}: {_form(row)} is not there any more."
            for row in before.comparison.rows
            if after.comparison.find(row.variant, row.target, row.precision, row.device) is None
        ]
    if not compared:
        raise InputError(
            "The two have no row in common; they are of other models, targets or devices."
        )
    found.sort(key=lambda change: _ORDER.index(change.kind))
    return Changes(tuple(found), compared, tuple(dict.fromkeys(notes)))


def _suite(given: SuiteResult | Comparison) -> SuiteResult:
    if isinstance(given, SuiteResult):
        return given
    # Two comparisons are one pair, whatever their models are called.
    return SuiteResult((Result("", given.model, "", None, "", (), given),))


def _pairs(old: SuiteResult, new: SuiteResult, notes: list[str]) -> Iterator[tuple[Result, Result]]:
    for after in new.results:
        before = old.find(after.name)
        if before is None:
            notes.append(f"{after.name} is new.")
        elif after.comparison is None or before.comparison is None:
            when = "now" if after.comparison is None else "then"
            notes.append(f"{after.name} was not measured {when}.")
        else:
            model = after.comparison.model
            yield before, after if after.name else _named(after, model)
    notes += [
        f"{result.name} is not there any more."
        for result in old.results
        if new.find(result.name) is None
    ]


def _named(result: Result, name: str) -> Result:
    return Result(name, result.model, "", None, "", (), result.comparison)


def _elsewhere(before: Result, after: Result, notes: list[str]) -> set[str]:
    """Return the devices whose times say nothing of each other; say so."""
    assert before.comparison is not None
    assert after.comparison is not None
    then = {facts.name: (facts.model, facts.soc) for facts in before.comparison.devices}
    found = set()
    for facts in after.comparison.devices:
        device = facts.name
        was, now = before.machines.get(device), after.machines.get(device)
        if device == LOCAL and was is not None and now is not None and was != now:
            notes.append(
                f"{after.name}: times are not compared, which were measured on {was} then and on "
                f"{now} now."
            )
            found.add(device)
        elif device in then and then[device] != (facts.model, facts.soc):
            notes.append(
                f"{after.name}: times on {device} are not compared, which was "
                f"{_said(*then[device])} then and is {_said(facts.model, facts.soc)} now."
            )
            found.add(device)
    return found


def _said(model: str | None, soc: str | None) -> str:
    return ", ".join(filter(None, (model, soc))) or "unknown"


def _changes(
    name: str, before: Row, after: Row, are_times_comparable: bool, notes: list[str]
) -> Iterator[Change]:
    form = _form(after)
    old_s, new_s = before.latency.median_s, after.latency.median_s
    if are_times_comparable:
        ratio = ratio_of_medians(after.latency.samples_s, before.latency.samples_s)
        if ratio.low is None:
            notes.append(f"{name}: {form} has too few runs for its times to be compared.")
        elif ratio.measurable:
            kind: Kind = "slower" if ratio.value > 1 else "faster"
            yield Change(kind, name, form, old_s, new_s, ratio.low, ratio.high)
    old_bytes, new_bytes = before.size_bytes, after.size_bytes
    if old_bytes and new_bytes and abs(new_bytes / old_bytes - 1) > _OF_SIZE:
        kind = "larger" if new_bytes > old_bytes else "smaller"
        yield Change(kind, name, form, old_bytes, new_bytes, None, None)
    old, new = _share(before), _share(after)
    if old is not None and new is not None and _differ(old, new):
        kind = "less accurate" if new.value < old.value else "more accurate"
        yield Change(kind, name, form, old.value, new.value, None, None)


def _share(row: Row) -> Share | None:
    """Return how right a row is: its accuracy, else how often it answers as the model does."""
    if row.accuracy is not None:
        return row.accuracy
    return None if row.answers is None else row.answers.agreement


def _differ(old: Share, new: Share) -> bool:
    if old.low is None or old.high is None or new.low is None or new.high is None:
        return old.value != new.value
    return new.high < old.low or old.high < new.low


def _form(row: Row) -> str:
    where = "" if row.device == LOCAL else f", on {row.device}"
    return f"{row.variant}, {row.target} {row.precision}{where}"
