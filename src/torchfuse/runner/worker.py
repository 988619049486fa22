"""A worker, from the inside: a process that runs one model, and does what each line tells it."""

import contextlib
import gc
import hashlib
import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from torchfuse.runner.loop import Turns, timed, warm_up
from torchfuse.runner.runtimes import decoded, runtime_for

__all__ = ["become_worker"]


def become_worker(commands: int, answers: int) -> None:
    """Serve on these file descriptors and end this process; never returns."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asked ends the workers
        os.dup2(2, 1)  # what a runtime prints is no answer
        with os.fdopen(commands) as reader, os.fdopen(answers, "w") as writer:
            _serve(reader, writer)
        status = 0
    except BrokenPipeError:  # nobody listens any more
        status = 0
    finally:
        os._exit(status)


def _serve(commands: IO[str], answers: IO[str]) -> None:
    """Do what each line says, answer each with a line, until there are no more."""
    loaded: _Loaded | None = None
    gc.disable()  # as timeit does: a collection in the middle of a call is not the model's time
    with contextlib.ExitStack() as scope:
        for line in commands:
            command = json.loads(line)
            try:
                if command["do"] == "load":
                    scope.enter_context(runtime_for(command["form"]).scope())
                    loaded = _Loaded(command)
                    gc.collect()
                    answer = loaded.facts()
                else:
                    assert loaded is not None
                    answer = loaded.did(command)
            except Exception as error:  # noqa: BLE001  # whatever a model raises, the asker is told
                answer = {"error": _reason(error)}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # TorchScript's own first line says only that something failed, and its last one what.
    in_script = bool(lines) and lines[0].startswith("The following operation failed")
    return (lines[-1] if in_script else lines[0]) if lines else type(error).__name__


class _Loaded:
    """A model in this process, after its first inference."""

    def __init__(self, command: Mapping[str, Any]) -> None:
        folder = Path(command["folder"])
        runtime = runtime_for(command["form"])
        threads = runtime.set_threads(command["threads"])
        args = decoded(command["args"], runtime, folder)
        kwargs = decoded({"dict": command["kwargs"]}, runtime, folder)
        self._idle_bytes = _memory_bytes("VmRSS")
        _forget_peak()
        start = time.perf_counter()
        model = runtime.load(command["path"], command["form"])
        self._load_s = time.perf_counter() - start
        call = runtime.call(model, args, kwargs)
        start = time.perf_counter()
        outputs = call()
        self._first_inference_s = time.perf_counter() - start
        self._outputs = [
            _written(folder / f"{command['outputs']}{i}.bin", *output)
            for i, output in enumerate(runtime.flat(outputs))
        ]
        self._can_set_threads = threads is not None
        self._threads = _running_threads() if threads is None else threads
        self._timed = timed(call)
        self._turns = Turns(self._timed)

    def facts(self) -> dict[str, Any]:
        return {
            "load_s": self._load_s,
            "first_inference_s": self._first_inference_s,
            "threads": self._threads,
            "can_set_threads": self._can_set_threads,
            "idle_memory_bytes": self._idle_bytes,
            "outputs": self._outputs,
        }

    def did(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Do what the command says; return the answer."""
        if command["do"] == "warm_up":
            count, settled = warm_up(self._timed, command["count"])
            return {"warmup_runs": count, "settled": settled}
        if command["do"] == "turn":
            return {"samples_s": self._turns(command["untimed"], command["timed"])}
        assert command["do"] == "memory"
        return {
            "peak_memory_bytes": _memory_bytes("VmHWM"),
            "page_faults": self._turns.page_faults,
        }


def _written(path: Path, dtype: str, shape: list[int], data: bytes) -> dict[str, Any]:
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    return {"file": path.name, "dtype": dtype, "shape": shape, "sha256": digest}


def _memory_bytes(field: str) -> int | None:
    """Return a field of this process's memory; None where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def _forget_peak() -> None:
    # A process that was forked begins with the peak of the one that it came from.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _running_threads() -> int | None:
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return None
