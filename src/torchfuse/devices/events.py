"""What a runner on a device may tell: nothing else is believed, since a device may say anything."""

import math
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["checked"]

Holds = Callable[[Any], bool]


def checked(event: Mapping[str, Any], artifacts: int) -> Mapping[str, Any]:
    """Return an event of a job of so many artifacts, if it is one that `runner.job` tells.

    Raises:
        ValueError: it is none; the text says why.
    """
    kind = event.get("kind")
    fields = _FIELDS.get(kind) if isinstance(kind, str) else None
    if fields is None:
        raise ValueError("an event of no known kind")
    for name, holds in fields.items():
        if name not in event or not holds(event[name]):
            raise ValueError(f"an event '{kind}' without a valid '{name}'")
    if "artifact" in fields and event["artifact"] >= artifacts:
        raise ValueError(f"an event '{kind}' of a model that it was not given")
    if kind == "loaded":
        _check_outputs(event)
    if kind == "round":
        _check_round(event, artifacts)
    return event


def _check_outputs(event: Mapping[str, Any]) -> None:
    # A name of the device's own choice could lead anywhere here.
    for number, output in enumerate(event["outputs"]):
        if output["file"] != f"output-{event['artifact']}-{number}.bin":
            raise ValueError("an output file of another name than its own")


def _check_round(event: Mapping[str, Any], artifacts: int) -> None:
    samples_s = event["samples_s"]
    if set(samples_s) != {str(index) for index in range(artifacts)}:
        raise ValueError("a round of other models than it was given")
    if len(counts := {len(times) for times in samples_s.values()}) != 1:
        raise ValueError("a round in which the models have unequal numbers of times")
    if not 1 <= counts.pop() <= event["turn_runs"] or event["done"] > event["rounds"]:
        raise ValueError("a round that is none of its own job")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_positive(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**63 and math.isfinite(value)


def _is_time(value: Any) -> bool:
    return _is_number(value) and value > 0


def _or_none(holds: Holds) -> Holds:
    return lambda value: value is None or holds(value)


def _list_of(holds: Holds) -> Holds:
    return lambda value: isinstance(value, list) and all(map(holds, value))


def _fields(**fields: Holds) -> Holds:
    """Return whether a value is a dict of exactly these fields."""
    return lambda value: (
        isinstance(value, dict)
        and set(value) == set(fields)
        and all(holds(value[name]) for name, holds in fields.items())
    )


def _is_times_by_artifact(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_list_of(_is_time), value.values()))


_numbers = _or_none(_list_of(_is_number))
_zone = _fields(name=_is_text, temperature_c=_is_number, passive_c=_or_none(_is_number))
_state = _fields(
    uptime_s=_or_none(_is_number),
    cores=_or_none(_is_positive),
    usable_cores=_or_none(_is_time),
    load_average=_or_none(_is_number),
    busy_s=_numbers,
    stolen_s=_numbers,
    own_cpu_s=_or_none(_is_number),
    quota_waited_s=_or_none(_is_number),
    governors=_or_none(_list_of(_is_text)),
    frequencies_hz=_numbers,
    max_frequencies_hz=_numbers,
    thermal_throttles=_or_none(_is_count),
    thermal_zones=_or_none(_list_of(_zone)),
)
_output = _fields(file=_is_text, dtype=_is_text, shape=_list_of(_is_count), sha256=_is_text)

_FIELDS: Mapping[str, Mapping[str, Holds]] = {
    "runtime": {
        "form": _is_text,
        "name": _is_text,
        "version": _is_text,
        "debug_build": _is_flag,
        "operators": _list_of(_is_text),
        "machine": _is_text,
    },
    "loaded": {
        "artifact": _is_count,
        "load_s": _is_number,
        "first_inference_s": _is_number,
        "idle_memory_bytes": _or_none(_is_count),
        "threads": _or_none(_is_positive),
        "can_set_threads": _is_flag,
        "outputs": _list_of(_output),
    },
    "warm": {
        "artifact": _is_count,
        "warmup_runs": _is_count,
        "settled": _or_none(_is_flag),
    },
    "state": {"state": _state},
    "round": {
        "done": _is_positive,
        "rounds": _is_positive,
        "turn_runs": _is_positive,
        "samples_s": _is_times_by_artifact,
    },
    "measured": {
        "artifact": _is_count,
        "peak_memory_bytes": _or_none(_is_count),
        "page_faults": _or_none(_is_number),
    },
    "failed": {"artifact": _is_count, "reason": _is_text},
    "end": {},
}
