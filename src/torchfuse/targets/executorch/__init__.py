"""ExecuTorch (`.pte`): today's mobile target, a program for the XNNPACK delegate."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchfuse.targets.sealing import damaged, seal_pte, unseal_binary
from torchfuse.targets.target import CheckedFile, Files, Made, Request, Target

if TYPE_CHECKING:
    from torchfuse.cases import Case
    from torchfuse.operator_times import Profile
    from torchfuse.targets.executorch.program import ExecutorchModel

__all__ = ["ExecuTorch"]

# flatbuffer's root offset (u32), "ET" and two digits, "eh" and two digits, header length (u32),
# program size, segment base offset, segment data size (u64 each): executorch/runtime/executor and
# schema/extended_header.h
_HEADER = struct.Struct("<I4s4sIQQ")
_SEGMENT_SIZE = struct.Struct("<Q")
_HEADER_WITHOUT_SEGMENT_SIZE = 24  # its length field's value in files of older versions


class ExecuTorch(Target):
    """An ExecuTorch program that runs on XNNPACK as far as XNNPACK can."""

    name = "ExecuTorch"
    suffix = ".pte"
    extra = "executorch"
    modules = ("executorch", "torchao")
    distribution = "executorch"
    precisions = ("fp32", "fp16", "int8")
    folds = ("conv + bn", "linear + bn", "conv + relu", "linear + relu")
    native_runner = "executor_runner"
    quantized_by = "pt2e"
    for_phones = True
    always_fused = (
        "ExecuTorch folds batch norms whenever it lowers a model, so there is no non-fused "
        "'.pte'; compare with eager mode, or with a non-fused '.pt'."
    )

    def make(self, request: Request) -> Made:
        """Return the model lowered: as it is, with half inside, or quantized."""
        from torchfuse.targets.executorch.pte_file import made

        return made(request)

    def seal(self, files: Files, metadata: Mapping[str, Any]) -> Files:
        """Return the program with a seal after it."""
        return {self.suffix: seal_pte(files[self.suffix], metadata)}

    def unseal(self, path: Path, files: Files) -> Mapping[str, Any] | None:
        """Return what is in the seal after the program."""
        return unseal_binary(path, files[self.suffix])

    def check(self, path: Path, files: Files) -> None:
        """Raise ArtifactError unless the file is as long as its header says, and no longer."""
        check_header(path, files[self.suffix])

    def first_load(self, path: Path) -> None:
        """Load every method, and run it on ones."""
        from torchfuse.targets.executorch.first_load import load

        load(str(path))

    def load(self, file: CheckedFile, *, threads: int | None = None) -> "ExecutorchModel":
        """Return the loaded program; `threads` are the process's, for all programs in it."""
        from torchfuse.targets.executorch.program import ExecutorchModel, set_threads

        if threads is not None:
            set_threads(threads)
        metadata = file.metadata or {}
        return ExecutorchModel(file.data, metadata.get("signature"), metadata.get("preprocessing"))

    def operators(self, path: Path) -> Sequence[str]:
        """Return the names of the operators outside the delegate: `aten::add.out`."""
        from executorch.exir._serialize._program import deserialize_pte_binary

        from torchfuse.targets.executorch.xnnpack import operators

        program = deserialize_pte_binary(path.read_bytes()).program
        return sorted({name for plan in program.execution_plan for name in operators(plan)})

    def profile(
        self, file: CheckedFile, case: "Case", *, name: str, warmup: int, runs: int, threads: int
    ) -> "Profile":
        """Return where the time of a run goes, by the runtime's event tracer."""
        from torchfuse.targets.executorch.event_tracer import profiled

        return profiled(file, case, name=name, warmup=warmup, runs=runs, threads_wanted=threads)

    def profile_obstacle(self) -> str | None:
        """Nothing: since 1.5 the wheel's runtime has an event tracer."""
        return None


def check_header(path: Path, data: bytes) -> None:
    """Raise ArtifactError unless the file is as long as its header says, and no longer."""
    if len(data) < _HEADER.size:
        raise damaged(path, f"{len(data)} bytes are too few for an ExecuTorch program")
    root, magic, header, header_length, program_size, segments_start = _HEADER.unpack_from(data)
    # load_program aborts the process on a wrong identifier, so it must not see one.
    if not (magic[:2] == b"ET" and magic[2:].isdigit()):
        raise damaged(path, f"an ExecuTorch program has 'ET12' at byte 4, this has {magic!r}")
    if not (header[:2] == b"eh" and header[2:].isdigit()):
        raise damaged(path, "its extended header, which holds its size, is missing")
    segments_size = 0
    if header_length > _HEADER_WITHOUT_SEGMENT_SIZE:
        if len(data) < _HEADER.size + _SEGMENT_SIZE.size:
            raise damaged(path, f"{len(data)} bytes are too few for an ExecuTorch program")
        (segments_size,) = _SEGMENT_SIZE.unpack_from(data, _HEADER.size)
    size = max(program_size, segments_start + segments_size)
    if len(data) < size:
        raise damaged(path, f"its header promises {size:,} bytes, but it has {len(data):,}")
    if root >= program_size or program_size < _HEADER.size:
        raise damaged(path, "the sizes in its header contradict each other")
    if len(data) > size:  # ExecuTorch writes nothing there, so it was a seal
        raise damaged(path, f"the {len(data) - size} bytes after the program are no whole seal")
