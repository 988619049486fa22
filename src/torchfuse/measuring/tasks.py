"""A model file and its inputs as a worker takes them: checked, run once here, inputs as raw files.

The outputs of that one run are what any other machine's outputs are compared with.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchfuse.cases import Case
from torchfuse.errors import ArtifactError, InputError
from torchfuse.exporting.file_inputs import inputs_of
from torchfuse.exporting.model_files import loaded
from torchfuse.targets.calling import Model
from torchfuse.targets.opening import check
from torchfuse.targets.target import CheckedFile

__all__ = ["Task", "task_of"]


@dataclass(frozen=True, eq=False)
class Task:
    """What a worker is told to load, and what its first call should return."""

    path: Path
    form: str
    case: Case
    args: list[Any]  # as runner.runtimes.decoded takes them; files are in the task's folder
    kwargs: Mapping[str, Any]
    folder: Path
    input_files: tuple[str, ...]
    expected: tuple[torch.Tensor, ...]  # this machine's outputs
    size_bytes: int
    sha256: str
    metadata: Mapping[str, Any]  # what torchfuse.export sealed into the file; empty: nothing

    @property
    def artifact(self) -> dict[str, Any]:
        """What a worker is told of the file and its inputs, wherever they lie."""
        return {"form": self.form, "args": self.args, "kwargs": dict(self.kwargs)}


def task_of(path: str | os.PathLike[str], case: Case | None, folder: Path) -> Task:
    """Return the task of running the file at `path` on `case`; inputs are written to `folder`.

    Without a `case` these are tensors of ones, of the shapes that the file was made for.

    Raises:
        ArtifactError: the file is missing, damaged or of an unknown kind.
        InputError: an input that no worker can be given: sparse, quantized, or no plain data; or
            none is given, and the file does not say what it takes.
    """
    file = check(path)
    model = loaded(file)
    if case is None:
        case = inputs_of(file, model)
    with torch.inference_mode():
        outputs = model(*case.args, **case.kwargs)
    args, kwargs = list(case.args), dict(case.kwargs)
    if isinstance(model, Model):  # programs take all inputs by position, flat
        args, kwargs = model.flat(case.args, case.kwargs), {}
    files: dict[str, None] = {}
    return Task(
        path=file.path,
        form=file.format,
        case=case,
        args=[_encoded(arg, folder, files) for arg in args],
        kwargs={name: _encoded(value, folder, files) for name, value in kwargs.items()},
        folder=folder,
        input_files=tuple(files),
        expected=tuple(
            leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)
        ),
        size_bytes=file.size_bytes,
        sha256=_sha256(file),
        metadata=file.metadata or {},
    )


def _sha256(file: CheckedFile) -> str:
    return hashlib.sha256(file.data).hexdigest()


def _encoded(value: Any, folder: Path, files: dict[str, None]) -> Any:
    if isinstance(value, torch.Tensor):
        return _written(value, folder, files)
    if isinstance(value, list):
        return [_encoded(item, folder, files) for item in value]
    if type(value) is tuple:
        return {"tuple": [_encoded(item, folder, files) for item in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encoded(item, folder, files) for key, item in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(
        "Expected inputs made of tensors, numbers, text, tuples, lists and dicts with names as "
        f"keys, got {type(value).__name__}; a file is measured in a process of its own, which can "
        "be given no other."
    )


def _written(tensor: torch.Tensor, folder: Path, files: dict[str, None]) -> dict[str, Any]:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex():
        raise InputError(
            f"Expected dense real inputs, got one of {tensor.dtype} that is {tensor.layout}; a "
            "file is measured in a process of its own, which can be given no other."
        )
    # Dense in memory, and in the order of its strides, so that channels_last stays what it is.
    dense = torch.empty_like(tensor, memory_format=torch.preserve_format).copy_(tensor).detach()
    flat = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
    data = flat.cpu().numpy().tobytes()
    name = f"{hashlib.sha256(data).hexdigest()[:16]}.bin"
    try:
        (folder / name).write_bytes(data)
    except OSError as error:
        raise ArtifactError(
            f"The inputs ({len(data):,} bytes) cannot be written to '{folder}' for the process "
            f"that measures: {error.strerror}; set TMPDIR to a folder with room."
        ) from error
    files[name] = None
    return {
        "file": name,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(dense.shape),
        "strides": list(dense.stride()),
    }
