"""AOTInductor (`.aoti.pt2`): the model compiled to machine code for the CPU that it is made on."""

import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from torchfuse.errors import ArtifactError
from torchfuse.targets.aotinductor.cpu import this_cpu, what_lacks
from torchfuse.targets.sealing import ZipSeal, check_zip, damaged
from torchfuse.targets.target import CheckedFile, Files, Made, Request, Target

if TYPE_CHECKING:
    from torchfuse.targets.aotinductor.package import AotiModel

__all__ = ["AotInductor"]


class AotInductor(ZipSeal, Target):
    """A package of machine code that torch loads; its weights are frozen into it."""

    name = "AOTInductor"
    suffix = ".aoti.pt2"
    modules = ("torch",)
    distribution = "torch"
    precisions = ("fp32", "int8")
    folds = ("conv + bn", "linear + bn", "conv + activation", "pointwise chains")
    always_fused = (
        "AOTInductor folds batch norms when it freezes a model, and unfrozen it is three times "
        "slower, so there is no non-fused '.aoti.pt2'; compare with a non-fused '.pt' or '.onnx'."
    )

    def obstacle(self) -> str | None:
        """Say that there is no C++ compiler, where there is none."""
        compiler = os.environ.get("CXX", "clang++" if platform.system() == "Darwin" else "g++")
        if shutil.which(compiler) is None:
            return (
                f"'{self.suffix}' is made by a C++ compiler, and '{compiler}' is not to be found; "
                "install one (apt install g++), or name another with CXX"
            )
        return super().obstacle()

    def make(self, request: Request) -> Made:
        """Return the model compiled and frozen; int8 by X86InductorQuantizer."""
        from torchfuse.targets.aotinductor.compiling import made

        return made(request)

    def check(self, path: Path, files: Files) -> None:
        """Raise ArtifactError unless the archive is whole and holds compiled code."""
        names = check_zip(path, files[self.suffix], "an AOTInductor package")
        if not any(name.startswith("data/aotinductor/") for name in names):
            raise damaged(path, "it holds no compiled model; an exported program is none yet")

    def first_load(self, path: Path) -> None:
        """Load its code."""
        from torchfuse.targets.aotinductor.package import package

        package(path.read_bytes())

    def load(self, file: CheckedFile, *, threads: int | None = None) -> "AotiModel":
        """Return the model, if this is a CPU and a torch that it was made for.

        Raises:
            ArtifactError: it was made for another, or torch refuses it.
        """
        from torchfuse.targets.aotinductor.package import AotiModel

        metadata = file.metadata or {}
        if self.other_version(metadata) is not None:
            raise ArtifactError("it is machine code for one torch")
        if (lacking := what_lacks(this_cpu(), metadata.get("cpu", {}))) is not None:
            raise ArtifactError(f"{lacking}; export it again on this machine")
        return AotiModel(
            file.data, metadata.get("signature"), metadata.get("preprocessing"), threads
        )
