"""Measurements as text, a block each and a closing sentence, and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torchfuse.machine import Machine
from torchfuse.stats import Ratio
from torchfuse.timing import Measurement, ratio

__all__ = ["block", "closing", "duration", "to_json"]

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def duration(seconds: float, like: float | None = None) -> str:
    """Return a time with a unit that suits it, or that suits `like`.

    >>> duration(0.0123456)
    '12.35 ms'
    >>> duration(0.000004, like=0.0123)
    '0.00 ms'
    """
    reference = seconds if like is None else like
    scale, unit = next((entry for entry in _UNITS if reference >= entry[0]), _UNITS[-1])
    return f"{seconds / scale:.2f} {unit}"


def block(measured: Measurement) -> str:
    """Return the lines that tell one measurement: centre and spread, range, counts."""
    centre = measured.median_s

    def shown(seconds: float) -> str:
        return duration(seconds, like=centre)

    threads = f"{measured.threads} thread{'s' if measured.threads > 1 else ''}"
    return "\n".join(
        [
            f"{measured.name}",
            f"  Time (median ± IQR):   {shown(centre)} ± {shown(measured.iqr_s)}    "
            f"{measured.calls_per_s:.6g} per second",
            f"  Range (min … max):     {shown(measured.min_s)} … {shown(measured.max_s)}    "
            f"p5 … p95: {shown(measured.p5_s)} … {shown(measured.p95_s)}",
            f"  {measured.runs} runs after {measured.warmup_runs} warm-up runs, {threads}",
        ]
    )


def closing(measured: Sequence[Measurement]) -> str:
    """Return the sentence that compares the fastest with each of the others."""
    fastest, *others = sorted(measured, key=lambda m: m.median_s)
    lines = [f"{fastest.name} ran"]
    for other in others:
        speed_up = ratio(other, fastest)
        lines.append(f"  {_compared(speed_up)} {other.name}")
    return "\n".join(lines)


def _compared(speed_up: Ratio) -> str:
    if speed_up.low is None or speed_up.high is None:
        interval = "(too few runs to say)"
    else:
        interval = f"({speed_up.confidence:.0%} interval {speed_up.low:.2f} … {speed_up.high:.2f})"
    if not speed_up.measurable:
        return f"with no measurable difference {interval} to"
    return f"{speed_up.value:.2f} times {interval} as fast as"


def to_json(
    measured: Sequence[Measurement], machine: Machine, *, versions: dict[str, str], inputs: str
) -> str:
    """Return everything that was measured, every sample and every ratio to the fastest."""
    done = [m for m in measured if m.samples_s]
    fastest = min(done, key=lambda m: m.median_s, default=None)
    report: dict[str, Any] = {
        "versions": versions,
        "machine": asdict(machine),
        "inputs": inputs,
        "results": [
            {
                **asdict(m),
                "median_s": m.median_s,
                "iqr_s": m.iqr_s,
                "p5_s": m.p5_s,
                "p95_s": m.p95_s,
                "min_s": m.min_s,
                "max_s": m.max_s,
                "mean_s": m.mean_s,
                "cautions": m.cautions,
            }
            for m in done
        ],
        "times_as_fast": [
            {
                "fastest": fastest.name,
                "other": m.name,
                **asdict(found),
                "measurable": found.measurable,
            }
            for m in done
            if fastest is not None and m is not fastest
            for found in [ratio(m, fastest)]
        ],
    }
    return json.dumps(report, indent=2) + "\n"
