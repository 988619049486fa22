"""What `python3 -m torchfuse.runner --save FILE` measured on a machine without torchfuse."""

from pathlib import Path

from torchfuse.devices.facts import DeviceFacts
from torchfuse.devices.record import ArtifactName, Record
from torchfuse.devices.run import DeviceRun
from torchfuse.errors import InputError
from torchfuse.runner.job import read_event
from torchfuse.serialization import from_plain

__all__ = ["run_from_record"]


def run_from_record(path: Path) -> DeviceRun:
    """Return what the runner saved in the file.

    Raises:
        InputError: it is no such file, or was cut short before anything was measured.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InputError(
            f"Expected what 'python3 -m torchfuse.runner --save' wrote, but '{path}' cannot be "
            f"read: {reason}."
        ) from error
    try:
        job = next(event for event in map(read_event, lines) if event is not None)
        names = from_plain(list[ArtifactName], job["artifacts"])
        record = Record(names, job["threads"], round_id=job["round_id"])
        for line in lines:
            if read_event(line) != job:
                record.take(line)
    except (StopIteration, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"Expected what 'python3 -m torchfuse.runner --save' wrote, but '{path}' is something "
            "else, or damaged at its beginning."
        ) from error
    machine = next((runtime["machine"] for runtime in record.runtimes), None)
    reason = None
    if record.failed is not None:
        reason = f"{names[record.failed[0]].name}: {record.failed[1]}."
    elif not record.ended:
        reason = f"'{path}' ends before the run did; what is there of it is whole rounds."
    return DeviceRun(
        DeviceFacts(path.name, "ready", architecture=machine),
        record.runner,
        record.measurements,
        record.cautions(emulated=None),
        error=reason,
    )
