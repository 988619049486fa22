"""An ExecuTorch program that is loaded, and the runtime that runs it, with its thread pool."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torchfuse.errors import ArtifactError, UnsupportedError
from torchfuse.isolation.warning_filters import known_warnings_ignored, runtime_logs_captured
from torchfuse.targets.calling import Input, Model, described
from torchfuse.targets.executorch.first_load import SCALAR_TYPES, reason

__all__ = ["ExecutorchModel", "runtime", "set_threads", "threads"]


@functools.cache
def runtime() -> Any:
    """Return ExecuTorch's runtime.

    Not by executorch.runtime, whose import brings all of its exporter in and takes seconds.
    """
    with known_warnings_ignored(), runtime_logs_captured():
        from executorch.extension.pybindings import _C

        return _C


# The runtime's thread pool is one per process. Methods that were loaded with the one before keep
# pointing at it, so they are loaded again before they run.
_pool = 0


def threads() -> int:
    """Return how many threads the runtime's thread pool has."""
    with runtime_logs_captured():
        return int(runtime()._threadpool_get_thread_count())


def set_threads(count: int) -> None:
    """Give the runtime, for the whole process, a thread pool of `count` threads."""
    global _pool
    if count != threads():
        with runtime_logs_captured():
            runtime()._unsafe_reset_threadpool(count)
        _pool += 1


class ExecutorchModel(Model):
    """A loaded program."""

    def __init__(
        self,
        program: bytes,
        signature: Mapping[str, Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> None:
        self._bytes = program
        self._load()
        inputs = _inputs(self._method.method_meta(), (signature or {}).get("sizes"))
        super().__init__(inputs, signature, preprocessing)
        self._ran = False

    @property
    def threads(self) -> int:
        """How many threads the runtime has, which are the process's."""
        return threads()

    def set_threads(self, count: int) -> None:
        """Run on so many threads, as every program of this process does from now on."""
        set_threads(count)

    def _load(self) -> None:
        lines: list[str] = []
        try:
            # The method points into the program, and the program into the bytes: all are kept.
            with runtime_logs_captured() as lines:
                self._program = runtime()._load_program_from_buffer(
                    self._bytes, program_verification=runtime().Verification.InternalConsistency
                )
                self._method = self._program.load_method("forward")
        except (RuntimeError, KeyError) as error:
            raise ArtifactError(reason(lines, error)) from error
        self._pool = _pool

    def _execute(self, inputs: list[Any]) -> Sequence[Any]:
        if self._pool != _pool:
            self._load()
        if self._ran:  # then it is unlikely to fail, and listening to the runtime costs time
            try:
                outputs: Sequence[Any] = self._method(inputs)
            except RuntimeError:
                return self._listening(inputs)
            return outputs
        outputs = self._listening(inputs)
        self._ran = True
        return outputs

    def _listening(self, inputs: list[Any]) -> Sequence[Any]:
        lines: list[str] = []
        try:
            with runtime_logs_captured() as lines:
                outputs: Sequence[Any] = self._method(inputs)
        except RuntimeError as error:
            raise UnsupportedError(
                f"ExecuTorch cannot run the program on {described(inputs)}: {reason(lines, error)}."
            ) from error
        return outputs


def _inputs(described: Any, sizes: Sequence[Any] | None) -> tuple[Input, ...]:
    """Return what the program takes; without `sizes`, any size up to the program's own."""
    inputs = []
    for index in range(described.num_inputs()):
        info = _tensor_info(described, index)
        if info is None:
            inputs.append(Input(None))
        else:
            ranges = sizes[index] if sizes else [(0, size) for size in info.sizes()]
            inputs.append(Input(SCALAR_TYPES.get(info.dtype()), tuple(map(tuple, ranges))))
    return tuple(inputs)


def _tensor_info(described: Any, index: int) -> Any:
    try:
        with runtime_logs_captured():  # the exception says enough
            return described.input_tensor_meta(index)
    except (RuntimeError, IndexError):  # not a tensor
        return None
