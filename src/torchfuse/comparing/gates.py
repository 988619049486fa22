"""Gates: conditions that a comparison must not meet, and an earlier one that it is judged by."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchfuse.errors import InputError
from torchfuse.stats import ratio_of_medians

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchfuse.comparing.comparison import Comparison, Row

__all__ = ["Condition", "failures", "parse_condition", "parse_share", "slower"]

_CONDITION = re.compile(
    r"(?:(?P<rows>[\w.:@-]+)\s+)?(?P<quantity>[a-z]+)\s*(?P<comparison>>=|<=|>|<)\s*"
    r"(?P<number>[-+]?[\d.]+(?:e[-+]?\d+)?)\s*(?P<unit>[^\s\d]+)?",
    re.IGNORECASE,
)
_COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_SIZES = {"bytes": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 1024.0, "MiB": 1024.0**2}
_SHARES = {"%": 0.01}
_POINTS = {"points": 0.01, "%": 0.01}


@dataclass(frozen=True)
class _Quantity:
    units: dict[str, float]  # in the quantity's own; "": the number stands alone
    of: Callable[[Row, Comparison], float | None]  # None: it is not known of that row


def _accuracy(row: Row, _: Comparison) -> float | None:
    return None if row.accuracy is None else row.accuracy.value


def _drop(row: Row, comparison: Comparison) -> float | None:
    before = comparison.baseline.accuracy
    return None if row.accuracy is None or before is None else before.value - row.accuracy.value


def _agreement(row: Row, _: Comparison) -> float | None:
    found = None if row.answers is None else row.answers.agreement
    return None if found is None else found.value


def _delegation(row: Row, _: Comparison) -> float | None:
    return None if row.delegation is None else row.delegation.macs_share


QUANTITIES = {
    "latency": _Quantity(_TIMES, lambda row, _: row.latency.median_s),
    "size": _Quantity(_SIZES, lambda row, _: row.size_bytes),
    "speedup": _Quantity({"": 1.0, "x": 1.0, "×": 1.0}, lambda row, _: row.speedup.value),
    "difference": _Quantity({"": 1.0}, lambda row, _: row.difference.max_rel),
    "sqnr": _Quantity({"dB": 1.0}, lambda row, _: row.difference.sqnr_db),
    "accuracy": _Quantity(_SHARES, _accuracy),
    "drop": _Quantity(_POINTS, _drop),
    "agreement": _Quantity(_SHARES, _agreement),
    "delegation": _Quantity(_SHARES, _delegation),
}


@dataclass(frozen=True)
class Condition:
    """One `--fail-if`."""

    text: str
    rows: tuple[str, ...]  # what a row must have: a target, precision, variant or device; (): any
    quantity: str
    comparison: str
    bound: float  # in the quantity's own unit: seconds, bytes, a share

    def is_about(self, row: Row) -> bool:
        """Whether it is to be judged on that row."""
        names = {
            row.target.removeprefix("."),
            row.precision,
            row.variant.replace(" ", "-"),
            row.device,
        }
        return names.issuperset(self.rows)


def parse_condition(text: str) -> Condition:
    """Return the condition that a text states.

    >>> parse_condition("pte.int8 latency > 5 ms").bound
    0.005
    >>> parse_condition("drop > 0.5 points").rows
    ()

    Raises:
        InputError: it states none, or lacks the unit.
    """
    match = _CONDITION.fullmatch(text.strip())
    if match is None:
        raise InputError(
            f"'{text}' is no condition: expected rows, a quantity, a comparison and a bound with "
            "its unit, such as 'pte.int8 latency > 5 ms'."
        )
    name = match["quantity"].lower()
    if name not in QUANTITIES:
        raise InputError(
            f"'{text}' is about '{match['quantity']}', which is none of {', '.join(QUANTITIES)}."
        )
    units, unit = QUANTITIES[name].units, match["unit"] or ""
    if unit not in units:
        known = " or ".join(repr(known) for known in units if known)
        wanted = f"a bound in {known}" if "" not in units else "a bound without a unit"
        raise InputError(f"'{text}' needs {wanted}, got '{match['number']} {unit}'.")
    try:
        number = float(match["number"])
    except ValueError:
        raise InputError(f"'{text}' has no number to compare with: '{match['number']}'.") from None
    rows = tuple((match["rows"] or "").split(".")) if match["rows"] else ()
    return Condition(text, rows, name, match["comparison"], number * units[unit])


def parse_share(text: str) -> float:
    """Return a share that is given in percent.

    >>> parse_share("5%")
    0.05

    Raises:
        InputError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    if match is None:
        raise InputError(f"Expected a share such as 5%, got '{text}'.")
    return float(match[1]) / 100


def failures(condition: Condition, comparison: Comparison) -> list[str]:
    """Return a sentence for each row that meets the condition, or that there is none to judge."""
    rows = [row for row in comparison.rows if condition.is_about(row)]
    quantity = QUANTITIES[condition.quantity]
    found = [(row, quantity.of(row, comparison)) for row in rows]
    known = [(row, value) for row, value in found if value is not None]
    if not known:
        what = "there is no such row" if not rows else f"its {condition.quantity} is not known"
        return [f"'{condition.text}' could not be judged: {what}."]
    unit, scale = _unit_of(condition)
    return [
        f"'{condition.text}': {_name(row)} has {_number(value / scale)}{unit}."
        for row, value in known
        if _COMPARISONS[condition.comparison](value, condition.bound)
    ]


def _unit_of(condition: Condition) -> tuple[str, float]:
    match = _CONDITION.fullmatch(condition.text.strip())
    assert match is not None
    unit = match["unit"] or ""
    return f" {unit}" if unit else "", QUANTITIES[condition.quantity].units[unit]


def _number(value: float) -> str:
    return f"{value:.4g}"


def _name(row: Row) -> str:
    where = "" if row.device == "local" else f" on {row.device}"
    return f"{row.variant}, {row.target} {row.precision}{where},"


def slower(
    comparison: Comparison, earlier: Comparison, share: float
) -> tuple[list[str], list[str]]:
    """Return the rows that are slower than an earlier comparison's by more, and what is doubtful.

    A row is slower where the whole 95 % interval of its time over the earlier one's is beyond
    1 + share: what may be chance is no failure.

    Raises:
        InputError: the two have no row in common.
    """
    failed, doubts, common = [], [], 0
    for row in comparison.rows:
        before = earlier.find(row.variant, row.target, row.precision, row.device)
        if before is None:
            continue
        common += 1
        found = ratio_of_medians(row.latency.samples_s, before.latency.samples_s)
        if found.low is None or found.high is None:
            doubts.append(f"{_name(row)} has too few runs to be compared with the baseline")
        elif found.low > 1 + share:
            failed.append(
                f"{_name(row)} takes {found.value:.2f} times ({found.low:.2f} … {found.high:.2f}) "
                "as long as in the baseline."
            )
    if not common:
        raise InputError(
            "The baseline has no row in common with this comparison; make it with the same targets "
            "and variants."
        )
    then = {device.name: device.soc for device in earlier.devices}
    doubts += [
        f"the baseline was measured on another processor ({then[device.name]}, now {device.soc})"
        for device in comparison.devices
        if then.get(device.name) not in (None, device.soc)
    ]
    return failed, doubts
