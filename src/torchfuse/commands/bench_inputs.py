"""What `bench` runs files on: what --input or the tool's flags say, or what each file says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchfuse.errors import InputError
from torchfuse.measuring.speed_benchmark import FLAGS, Options
from torchfuse.model_source import InputSpec, parse_inputs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchfuse.cases import Case
    from torchfuse.measuring.tasks import Task

__all__ = ["Inputs", "described_inputs", "inputs_asked_for", "shown"]

_MAKING = ("input_dims", "no_inputs", "use_bundled_input", "pytext_len")  # each makes inputs
_FLAGS = (*_MAKING, "input_type", "input_memory_format")


@dataclass(frozen=True)
class Inputs:
    """What was asked for; with neither, each file says."""

    specs: tuple[InputSpec, ...] = ()
    flags: Options | None = None

    @property
    def in_files(self) -> bool:
        """Whether the files are to say."""
        return self.flags is None and not self.specs

    def case_for(self, path: str) -> Case | None:
        """Return the inputs for a file, tensors of ones; None: what it says itself."""
        from torchfuse.cases import Case
        from torchfuse.exporting.model_files import load
        from torchfuse.measuring.speed_benchmark import bundled_input, create_inputs

        if self.flags is not None:
            if self.flags.use_bundled_input >= 0:
                return Case(bundled_input(load(path), self.flags.use_bundled_input))
            return Case(create_inputs(self.flags))
        if not self.specs:
            return None
        return Case(
            tuple(_ones(spec) for spec in self.specs if spec.name is None),
            {spec.name: _ones(spec) for spec in self.specs if spec.name is not None},
        )


def inputs_asked_for(texts: Sequence[str], given: Mapping[str, Any]) -> Inputs:
    """Return what --input, as `texts`, and the tool's flags ask for.

    Raises:
        InputError: --input that cannot be read, both, or flags that lack what they are about.
    """
    specs = tuple(parse_inputs(texts))
    defaults = {flag.name: flag.default for flag in FLAGS}
    named = [name for name in _FLAGS if given.get(name, defaults[name]) != defaults[name]]
    if specs and named:
        raise InputError(
            f"Expected --input or --{named[0]}, got both; --input says sizes and types at once: "
            "1x3x224x224:uint8."
        )
    if named and not set(named) & set(_MAKING):
        raise InputError(
            f"--{named[0]} is about --input_dims; give that too, or --input, which says sizes and "
            "types at once: 1x3x224x224:uint8."
        )
    return Inputs(specs, Options(**_completed(given)) if named else None)


def _completed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags, with one type and format per tensor where they can be left out."""
    count = len([dims for dims in given.get("input_dims", "").split(";") if dims])
    completed = dict(given)
    for name, default in (("input_type", "float"), ("input_memory_format", "contiguous_format")):
        entries = completed.get(name, default)
        completed[name] = ";".join([entries] * count) if ";" not in entries else entries
    return completed


def described_inputs(inputs: Inputs, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Return what all files are run on, for the report.

    Raises:
        InputError: files that say different things, whose times cannot be compared.
    """
    if inputs.flags is not None:
        return {
            "inputs": inputs.flags.input_dims,
            "input_type": inputs.flags.input_type,
            "input_memory_format": inputs.flags.input_memory_format,
        }
    from torchfuse.exporting.file_inputs import described

    (first, task), *others = tasks.items()
    found = described(task.case)
    for name, other in others:
        if described(other.case) != found:
            raise InputError(
                f"'{first}' was made for {shown(task.case)} and '{name}' for {shown(other.case)}, "
                "and times on different inputs cannot be compared; give --input for both."
            )
    return {"inputs": found, "input_type": None, "input_memory_format": None}


def shown(case: Case) -> str:
    """Return the inputs as --input takes them, as far as it does."""
    import torch

    def one(value: Any) -> str:
        if not isinstance(value, torch.Tensor):
            return str(value) if isinstance(value, bool | int | float) else type(value).__name__
        sizes = "x".join(map(str, value.shape)) or "a scalar"
        return f"{sizes}:{str(value.dtype).removeprefix('torch.')}"

    named = [f"{name}={one(value)}" for name, value in case.kwargs.items()]
    return ", ".join([*map(one, case.args), *named]) or "no inputs"


def _ones(spec: InputSpec) -> Any:
    import torch

    return torch.ones(spec.shape, dtype=getattr(torch, spec.dtype))
