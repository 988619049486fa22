"""A job: several models on this machine, and a line for each thing that happens."""

import json
import platform
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchfuse.runner.loop import interleave, turn_length
from torchfuse.runner.machine_state import this_state
from torchfuse.runner.runtimes import runtime_for
from torchfuse.runner.workers import Worker, WorkerError, forked_workers

__all__ = ["event", "read_event", "run_job"]

Tell = Callable[[str], None]


def event(**what: Any) -> str:
    """Return a line that tells what happened, with a checksum: a line cut short is known as such.

    >>> event(kind="end")
    '{"kind": "end"} #d43ec1f1'
    """
    text = json.dumps(what)
    return f"{text} #{zlib.crc32(text.encode()):08x}"


def read_event(line: str) -> dict[str, Any] | None:
    """Return what an event's line tells; None for any other line, and for part of one."""
    text, _, checksum = line.rstrip("\r\n").rpartition(" #")
    if not text or f"{zlib.crc32(text.encode()):08x}" != checksum:
        return None
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def run_job(job: Mapping[str, Any], folder: Path, tell: Tell) -> None:
    """Measure the job's models, whose files are in `folder`; tell each event as it happens.

    Raises:
        RuntimeError: nothing here runs files of that form.
    """
    forms = sorted({artifact["form"] for artifact in job["artifacts"]})
    for form in forms:
        runtime = runtime_for(form)
        facts = {
            "name": runtime.name,
            "version": runtime.version,
            "debug_build": runtime.is_debug_build,
            "operators": runtime.operators(),
        }
        machine = {"python": platform.python_version(), "machine": platform.machine()}
        tell(event(kind="runtime", form=form, **facts, **machine))
    with forked_workers(len(job["artifacts"]), forms) as workers:
        try:
            _measure(job, folder, workers, tell)
        except WorkerError as error:  # what was measured until then has been told
            tell(event(kind="failed", artifact=error.index, reason=str(error)))
    tell(event(kind="end"))


def _measure(job: Mapping[str, Any], folder: Path, workers: Sequence[Worker], tell: Tell) -> None:
    for worker, artifact in zip(workers, job["artifacts"], strict=True):
        path = str(folder / artifact["path"])
        loaded = worker.load(artifact, path, str(folder), job["threads"])
        tell(event(kind="loaded", artifact=worker.index, **loaded))
    if not job["runs"]:
        return
    for worker in workers:
        warm = worker.ask("warm_up", count=job["warmup"])
        tell(event(kind="warm", artifact=worker.index, **warm))
    turns = {str(worker.index): worker.turn for worker in workers}
    length = turn_length(len(turns), job["runs"])
    tell(event(kind="state", state=asdict(this_state())))
    for done, rounds, samples_s in interleave(turns, job["runs"], job["seed"], job["done"]):
        tell(event(kind="round", done=done, rounds=rounds, turn_runs=length, samples_s=samples_s))
    tell(event(kind="state", state=asdict(this_state())))
    for worker in workers:
        tell(event(kind="measured", artifact=worker.index, **worker.ask("memory")))
