"""Where the time of a program's runs goes, by ExecuTorch's own event tracer on this machine."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchfuse.cases import Case
from torchfuse.errors import UnsupportedError, first_line
from torchfuse.isolation.warning_filters import runtime_logs_captured
from torchfuse.operator_times import Profile
from torchfuse.targets.executorch.etdump import profile_of_etdump
from torchfuse.targets.executorch.program import ExecutorchModel, runtime, set_threads, threads
from torchfuse.targets.target import CheckedFile

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["profiled"]


def profiled(
    file: CheckedFile, case: Case, *, name: str, warmup: int, runs: int, threads_wanted: int
) -> Profile:
    """Return where the time of `runs` runs after `warmup` others goes, delegates' kernels included.

    Raises:
        InputError: other inputs than it was made for.
        UnsupportedError: the program cannot run on them, or the runtime has no event tracer.
    """
    metadata = file.metadata or {}
    before = threads()
    set_threads(threads_wanted)
    try:
        inputs = ExecutorchModel(file.data, metadata.get("signature")).flat(case.args, case.kwargs)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run.etdump"
            _run(file.data, inputs, warmup + runs, path)
            if not path.exists():
                raise UnsupportedError(
                    "This build of ExecuTorch's runtime has no event tracer, so it keeps no "
                    "profile; install executorch 1.5 or newer."
                )
            return profile_of_etdump(path, name=name, skip=warmup)
    finally:
        set_threads(before)


def _run(data: bytes, inputs: list[Any], count: int, etdump: Path) -> None:
    with runtime_logs_captured():
        program = runtime()._load_program_from_buffer(data, enable_etdump=True)
        method: Callable[..., Any] = program.load_method("forward")
        try:
            with torch.inference_mode():
                for _ in range(count):
                    method(inputs)
        except RuntimeError as error:
            raise UnsupportedError(
                f"ExecuTorch cannot run the program: {first_line(error)}"
            ) from error
        program.write_etdump_result_to_file(str(etdump), None)
