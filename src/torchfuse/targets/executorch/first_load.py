"""The first load and run of a program that torchfuse did not write, in a process of its own.

The runtime aborts on some damaged files; here that ends a child, which `opening.check` reports.
"""

import contextlib
import re
from collections.abc import Sequence

import torch

from torchfuse.errors import ArtifactError, first_line
from torchfuse.isolation.warning_filters import runtime_logs_captured

__all__ = ["SCALAR_TYPES", "load", "reason"]

# ScalarType's numbers (c10/core/ScalarType.h), which is how the runtime describes an input.
SCALAR_TYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
}


def load(path: str) -> None:
    """Load every method of the program at `path`, and run it on ones."""
    from executorch.extension.pybindings import _C

    lines: list[str] = []
    try:
        with runtime_logs_captured() as lines:
            program = _C._load_program(
                path, program_verification=_C.Verification.InternalConsistency
            )
            names = sorted(map(program.get_method_name, range(program.num_methods())))
            methods = [program.load_method(name) for name in names]
    except (RuntimeError, KeyError) as error:
        raise ArtifactError(reason(lines, error)) from error
    for method in methods:
        # A run that raises only says that ones are no good input for this model; one that ends
        # the process is what this is about.
        with contextlib.suppress(RuntimeError, KeyError):
            described = method.method_meta()
            tensors = [described.input_tensor_meta(i) for i in range(described.num_inputs())]
            method([torch.ones(t.sizes(), dtype=SCALAR_TYPES[t.dtype()]) for t in tensors])


def reason(lines: Sequence[str], error: Exception) -> str:
    """Return why the runtime raised: what it printed; its exceptions hold a number.

    >>> reason(["[program.cpp:168] Check failed (a == b): Nothing in it."], RuntimeError("0x23"))
    'Nothing in it'
    """
    reasons = [re.sub(r"^\[.*?\] (Check failed \(.*?\): )?", "", line) for line in lines]
    return (reasons or [first_line(error)])[0].rstrip(".")
