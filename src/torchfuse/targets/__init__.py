"""Targets: what a model can be exported to and run by, one file or folder each.

Nothing outside this folder (and the runner, which is pushed to devices) knows a format by name.
"""

import os

from torchfuse.errors import ArtifactError
from torchfuse.targets.aotinductor import AotInductor
from torchfuse.targets.executorch import ExecuTorch
from torchfuse.targets.onnx import Onnx
from torchfuse.targets.openvino import OpenVino
from torchfuse.targets.target import Target
from torchfuse.targets.torchscript import TorchScript

__all__ = ["TARGETS", "Target", "target_for", "target_of"]

# In the order in which they are listed and compared.
TARGETS: tuple[Target, ...] = (
    ExecuTorch(),
    Onnx(),
    OpenVino(),
    AotInductor(),
    TorchScript(".pt"),
    TorchScript(".ptl"),
)


def target_of(form: str) -> Target:
    """Return the target whose files have this form: a suffix without its dot."""
    return target_for(f"model.{form}")


def target_for(path: str | os.PathLike[str]) -> Target:
    """Return the target that the file name's suffix asks for.

    Raises:
        ArtifactError: the suffix is not one of the known ones.
    """
    name = os.path.basename(os.fspath(path))
    fitting = [target for target in TARGETS if name.endswith(target.suffix)]
    if fitting and not name.startswith(fitting[0].suffix):
        return max(fitting, key=lambda target: len(target.suffix))  # .aoti.pt2 is no .pt2
    known = ", ".join(f"'{target.suffix}'" for target in TARGETS)
    suffix = os.path.splitext(name)[1]
    got = f"suffix '{suffix}'" if suffix else "no suffix"
    meanings = ", ".join(f"'{target.suffix}' is for {target.name}" for target in TARGETS)
    raise ArtifactError(
        f"Expected a file name that ends in one of {known}, got '{os.fspath(path)}' with {got}; "
        f"{meanings}."
    )
