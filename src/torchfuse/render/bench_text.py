"""Measurements as text: a block each, a closing sentence, and what to trust less."""

from collections.abc import Sequence

from torchfuse.devices.facts import DeviceFacts
from torchfuse.devices.run import DeviceRun
from torchfuse.measuring.timing import FileFacts, Measurement, ratio
from torchfuse.render.devices_text import described
from torchfuse.stats import Ratio
from torchfuse.units import duration, size

__all__ = ["block", "closing", "heading"]


def heading(run: DeviceRun) -> str:
    """Return the line that says where the measurements after it were taken, and by what."""
    ran_by = f"; measured by {run.runner}" if run.runner else ""
    return f"On {run.device.name}: {described(run.device)}{ran_by}"


def block(measured: Measurement) -> str:
    """Return the lines that tell one measurement: centre and spread, range, counts."""
    centre = measured.median_s

    def shown(seconds: float) -> str:
        return duration(seconds, like=centre)

    lines = [
        f"{measured.name}",
        f"  Time (median ± IQR):   {shown(centre)} ± {shown(measured.iqr_s)}    "
        f"{measured.calls_per_s:.6g} per second",
        f"  Range (min … max):     {shown(measured.min_s)} … {shown(measured.max_s)}    "
        f"p5 … p95: {shown(measured.p5_s)} … {shown(measured.p95_s)}",
    ]
    if measured.file is not None:
        lines.append(f"  {_file(measured.file)}")
    warmup = measured.warmup_runs
    lines.append(
        f"  {measured.runs} runs{'' if warmup is None else f' after {warmup} warm-up runs'}, "
        f"{_threads(measured.threads)}"
    )
    return "\n".join(lines)


def _threads(count: int | None) -> str:
    if count is None:
        return "threads as the runner has them"
    return f"{count} thread{'s' if count > 1 else ''}"


def _file(file: FileFacts) -> str:
    parts = [
        f"Load: {duration(file.load_s)}" if file.load_s is not None else "",
        f"first inference: {duration(file.first_inference_s)}"
        if file.first_inference_s is not None
        else "",
        f"memory: {size(max(0, file.model_memory_bytes))}"
        if file.model_memory_bytes is not None
        else "",
        f"file: {size(file.size_bytes)}",
    ]
    text = "    ".join(part for part in parts if part)
    return text[0].upper() + text[1:]


def closing(measured: Sequence[Measurement], device: DeviceFacts | None = None) -> str:
    """Return the sentence that compares the fastest with each of the others.

    It says for which kind of processor that holds.
    """
    fastest, *others = sorted(measured, key=lambda m: m.median_s)
    where = f", on {device.architecture}," if device is not None and device.architecture else ""
    lines = [f"{fastest.name} ran{where}"]
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
