"""The operators that a model file needs kernels for."""

from collections.abc import Sequence

from torchfuse.quieting import quiet
from torchfuse.tasks import Task

__all__ = ["operators_of"]


def operators_of(task: Task) -> Sequence[str]:
    """Return the names of the operators that run outside a delegate: `aten::add.out`.

    `torchfuse.export` notes them in the file; others are read for it, which takes seconds.
    """
    noted: Sequence[str] | None = task.metadata.get("operators")
    if noted is not None:
        return noted
    with quiet():
        if task.form == "pte":
            from executorch.exir._serialize._program import deserialize_pte_binary

            from torchfuse.targets.executorch import operators

            program = deserialize_pte_binary(task.path.read_bytes()).program
            return sorted({name for plan in program.execution_plan for name in operators(plan)})
        import torch
        from torch.jit.mobile import _export_operator_list, _load_for_lite_interpreter

        if task.form == "ptl":
            return sorted(_export_operator_list(_load_for_lite_interpreter(str(task.path))))
        return sorted(torch.jit.export_opnames(torch.jit.load(str(task.path))))
