"""Rewrites for XNNPACK: what its partitioner refuses, or has no fast kernel for, in another form.

Each is a function of an exported program, which it changes in place, and says how often it did.
All are exact in real arithmetic; the file that is made is compared with the model as any other is.
`benchmarks/targets.py` measures that each makes files faster, or else it goes.
"""

from collections.abc import Callable

import torch

from torchfuse.targets.executorch.rewrites.attention import write_attention_without_masking
from torchfuse.targets.executorch.rewrites.depthwise import split_large_depthwise_kernels
from torchfuse.targets.executorch.rewrites.matmul import write_matmul_as_bmm
from torchfuse.targets.executorch.rewrites.mean import keep_dimensions_of_means
from torchfuse.targets.executorch.rewrites.no_ops import remove_no_op_expands
from torchfuse.targets.executorch.rewrites.selecting import write_selections_as_slices

__all__ = ["REWRITES", "Rewrite", "rewrite"]

Rewrite = Callable[[torch.export.ExportedProgram], int]

# In this order: attention is written with matmuls, and what is selected is often what it is given.
REWRITES: tuple[Rewrite, ...] = (
    write_attention_without_masking,
    write_matmul_as_bmm,
    write_selections_as_slices,
    remove_no_op_expands,
    keep_dimensions_of_means,
    split_large_depthwise_kernels,
)


def rewrite(program: torch.export.ExportedProgram) -> dict[str, int]:
    """Apply every rewrite to the program, in place; return how often each found something."""
    counts = {each.__name__: each(program) for each in REWRITES}
    if any(counts.values()):
        program.graph.eliminate_dead_code()
        program.graph_module.recompile()
    return counts
