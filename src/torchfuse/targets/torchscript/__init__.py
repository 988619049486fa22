"""TorchScript (`.pt`) and its lite interpreter (`.ptl`): the legacy mobile targets."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torchfuse.errors import ArtifactError
from torchfuse.targets.sealing import ZipSeal, check_zip
from torchfuse.targets.target import CheckedFile, Files, Made, Request, Target

__all__ = ["TorchScript"]

_LITE = ".ptl"
_STATE_DICT = (
    " A state dict, as torch.save and 'torchfuse fuse -o' write it, holds weights and no model: "
    "load it into the model that torchfuse.fuse returns, and export that."
)


class TorchScript(ZipSeal, Target):
    """A scripted module, for the full or for the lite interpreter."""

    modules = ("torch",)
    distribution = "torch"
    precisions = ("fp32", "int8")
    folds = ()  # the file was optimized for mobile when it was made
    native_runner = "speed_benchmark_torch"
    quantized_by = "torch.ao"
    takes_any_size = True
    for_phones = True
    takes_dynamic_shapes = False

    def __init__(self, suffix: str) -> None:
        self.suffix = suffix
        self.most_compact_only = suffix == _LITE
        self.name = "the lite interpreter" if suffix == _LITE else "TorchScript"

    def make(self, request: Request) -> Made:
        """Return the model scripted, or else traced, and optimized for mobile."""
        from torchfuse.targets.torchscript.torchscript_file import made

        return made(request)

    def check(self, path: Path, files: Files) -> None:
        """Raise ArtifactError unless the archive is whole and holds a module."""
        names = check_zip(path, files[self.suffix], "a TorchScript file")
        code = "bytecode.pkl" if self.suffix == _LITE else "constants.pkl"
        for name in (code, "data.pkl"):
            if name not in names:
                loader = "lite interpreter" if self.suffix == _LITE else "TorchScript"
                raise ArtifactError(
                    f"Expected a {loader} model in '{path}', but its archive has no '{name}'; "
                    f"'torchfuse export net.py:build -o model{self.suffix}' writes one."
                    + ("" if "constants.pkl" in names else _STATE_DICT)
                )

    def first_load(self, path: Path) -> None:
        """Load the module."""
        import torch

        if self.suffix == _LITE:
            from torch.jit.mobile import _load_for_lite_interpreter

            _load_for_lite_interpreter(str(path))
        else:
            torch.jit.load(str(path), map_location="cpu")

    def load(self, file: CheckedFile, *, threads: int | None = None) -> Callable[..., Any]:
        """Return the module; `threads` are torch's, for the whole process."""
        import torch

        from torchfuse.targets.torchscript.scripting import deserialize

        if threads is not None:
            torch.set_num_threads(threads)
        return deserialize(file.data, self.form)

    def operators(self, path: Path) -> Sequence[str]:
        """Return the names of the operators of the module."""
        import torch
        from torch.jit.mobile import _export_operator_list, _load_for_lite_interpreter

        data = io.BytesIO(path.read_bytes())
        if self.suffix == _LITE:
            return sorted(_export_operator_list(_load_for_lite_interpreter(data)))
        return sorted(torch.jit.export_opnames(torch.jit.load(data)))

    def profile_obstacle(self) -> str | None:
        """Nothing: torch's profiler says it."""
        return None
