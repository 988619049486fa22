"""Measurements as files: JSON with every sample, CSV and Markdown with a row each."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchfuse.devices.facts import DeviceFacts
from torchfuse.devices.run import DeviceRun
from torchfuse.measuring.timing import Measurement, ratio
from torchfuse.render.devices_text import described
from torchfuse.render.profile import markdown
from torchfuse.render.tables import markdown_row
from torchfuse.serialization import parsed, plain
from torchfuse.serialization import to_json as plain_json
from torchfuse.stats import Ratio
from torchfuse.units import duration, size

__all__ = ["earlier_runs", "to_csv", "to_json", "to_markdown"]

_COLUMNS = (
    "device", "architecture", "name", "median_s", "iqr_s", "p5_s", "p95_s", "min_s", "max_s",
    "mean_s", "runs", "warmup_runs", "threads", "load_s", "first_inference_s",
    "idle_memory_bytes", "peak_memory_bytes", "size_bytes", "sha256",
)  # fmt: skip


def to_json(
    runs: Sequence[DeviceRun], *, versions: Mapping[str, str], settings: Mapping[str, Any]
) -> str:
    """Return everything that was measured, every sample and every ratio to the fastest."""
    report = {"versions": versions, "settings": settings, "runs": [_run(run) for run in runs]}
    return plain_json(report) + "\n"


def _run(run: DeviceRun) -> dict[str, Any]:
    done = [m for m in run.measurements if m.samples_s]
    fastest = min(done, key=lambda m: m.median_s, default=None)
    return {
        "device": run.device,
        "runner": run.runner,
        "error": run.error,
        "results": [{**plain(m), **_summary(m)} for m in done],
        "times_as_fast": [
            {
                "fastest": fastest.name,
                "other": m.name,
                **plain(found),
                "measurable": found.measurable,
            }
            for m in done
            if fastest is not None and m is not fastest
            for found in [ratio(m, fastest)]
        ],
        "profiles": run.profiles,
        "cautions": run.cautions,
        "differences_from_this_machine": {
            name: {"max_abs": d.max_abs, "max_rel": d.max_rel, "sqnr_db": d.sqnr_db}
            for name, d in run.differences
        },
    }


def _summary(measured: Measurement) -> dict[str, float]:
    names = ("median_s", "iqr_s", "p5_s", "p95_s", "min_s", "max_s", "mean_s")
    return {name: getattr(measured, name) for name in names}


def earlier_runs(text: str) -> tuple[Mapping[str, Any], dict[str, dict[str, Measurement]]]:
    """Return settings and versions and, by device and model, the measurements of `to_json`.

    Raises:
        ValueError: the text is no such JSON.
    """
    report = parsed(_Report, text)
    return {**report.settings, "versions": report.versions}, {
        run.device.name: {result.name: result for result in run.results} for run in report.runs
    }


@dataclass(frozen=True)
class _Run:
    """What is read back of a device's run."""

    device: DeviceFacts
    results: tuple[Measurement, ...]


@dataclass(frozen=True)
class _Report:
    """What is read back of what `to_json` wrote."""

    versions: dict[str, str]
    settings: dict[str, Any]
    runs: tuple[_Run, ...]


def to_csv(runs: Sequence[DeviceRun]) -> str:
    """Return a row for each measurement; times in seconds. The samples are in the JSON."""
    text = io.StringIO()
    rows = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    rows.writeheader()
    for run in runs:
        for m in run.measurements:
            rows.writerow(
                {
                    "device": run.device.name,
                    "architecture": run.device.architecture,
                    **plain(m),
                    **_summary(m),
                    "runs": m.runs,
                    **({} if m.file is None else plain(m.file)),
                }
            )
    return text.getvalue()


def to_markdown(runs: Sequence[DeviceRun]) -> str:
    """Return a table for each device, fastest first, with the ratio to the fastest."""
    parts = []
    for run in runs:
        lines = [f"{run.device.name}: {described(run.device)}", ""]
        if run.error is not None:
            lines += [f"Ended early: {run.error}", ""]
        done = sorted((m for m in run.measurements if m.samples_s), key=lambda m: m.median_s)
        if done:
            lines += [
                "| model | median | IQR | p5 … p95 | times as long as the fastest | load | size |",
                "|---|---:|---:|---:|---:|---:|---:|",
            ]
        lines += [_row(m, done[0]) for m in done]
        if run.profiles:
            lines += ["", markdown(run.profiles).rstrip("\n")]
        lines += ["", *(f"- {caution}." for caution in run.cautions)] if run.cautions else []
        parts.append("\n".join(lines).strip("\n") + "\n")
    return "\n".join(parts)


def _row(m: Measurement, fastest: Measurement) -> str:
    def shown(seconds: float) -> str:
        return duration(seconds, like=m.median_s)

    load = "" if m.file is None or m.file.load_s is None else duration(m.file.load_s)
    cells = [
        m.name,
        shown(m.median_s),
        shown(m.iqr_s),
        f"{shown(m.p5_s)} … {shown(m.p95_s)}",
        "1" if m is fastest else _times(ratio(m, fastest)),
        load,
        "" if m.file is None else size(m.file.size_bytes),
    ]
    return markdown_row(cells)


def _times(found: Ratio) -> str:
    if found.low is None:
        return "too few runs to say"
    if not found.measurable:
        return "no measurable difference"
    return f"{found.value:.2f} ({found.low:.2f} … {found.high:.2f})"
