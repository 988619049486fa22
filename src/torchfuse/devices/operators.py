"""The operators that a model file needs kernels for."""

from collections.abc import Sequence

from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.measuring.tasks import Task
from torchfuse.targets import target_of

__all__ = ["operators_of"]


def operators_of(task: Task) -> Sequence[str]:
    """Return the names of the operators that run outside a delegate: `aten::add.out`.

    `torchfuse.export` notes them in the file; others are read for it, which takes seconds.
    """
    noted: Sequence[str] | None = task.metadata.get("operators")
    if noted is not None:
        return noted
    with known_warnings_ignored():
        return target_of(task.form).operators(task.path)
