"""Rewrites for XNNPACK: what its partitioner refuses, or has no fast kernel for, in another form.

Each is a function of an exported program, which it changes in place, and says how often it did.
All are exact in real arithmetic; the file that is made is compared with the model as any other is.
`benchmarks/rewrites.py` measures what each buys: files are faster for it, or a program is in one
piece that was in several.
"""

from collections.abc import Callable, Sequence

import torch

from torchfuse.lowering.xnnpack_rewrites.attention import write_attention_without_masking
from torchfuse.lowering.xnnpack_rewrites.depthwise import split_large_depthwise_kernels
from torchfuse.lowering.xnnpack_rewrites.group_norm import write_out_group_norms
from torchfuse.lowering.xnnpack_rewrites.hardsigmoid import write_out_hardsigmoids
from torchfuse.lowering.xnnpack_rewrites.layer_norm import write_out_layer_norms
from torchfuse.lowering.xnnpack_rewrites.matmul import write_matmul_as_bmm
from torchfuse.lowering.xnnpack_rewrites.maximum import write_maxima_as_poolings
from torchfuse.lowering.xnnpack_rewrites.mean import (
    keep_dimensions_of_means,
    write_means_over_channels_as_convolutions,
)
from torchfuse.lowering.xnnpack_rewrites.padding import leave_padding_in_int8
from torchfuse.lowering.xnnpack_rewrites.selecting import write_selections_as_slices
from torchfuse.lowering.xnnpack_rewrites.softmax import write_softmax_of_rows
from torchfuse.lowering.xnnpack_rewrites.upsampling import write_upsampling_as_concatenations

__all__ = ["REWRITES", "REWRITES_ONCE_QUANTIZED", "Rewrite", "rewrite"]

Rewrite = Callable[[torch.export.ExportedProgram], int]

# In this order: attention is written with matmuls, and what is selected is often what it is given.
REWRITES: tuple[Rewrite, ...] = (
    write_attention_without_masking,
    write_matmul_as_bmm,
    write_selections_as_slices,
    keep_dimensions_of_means,
    write_maxima_as_poolings,
    write_upsampling_as_concatenations,
    split_large_depthwise_kernels,
)

# After quantizing: what stays in float whatever is quantized, so that no observer sees its parts
# and takes them for layers; and what is about int8 itself.
REWRITES_ONCE_QUANTIZED: tuple[Rewrite, ...] = (
    write_out_layer_norms,
    write_out_group_norms,
    write_softmax_of_rows,
    write_means_over_channels_as_convolutions,
    write_out_hardsigmoids,
    leave_padding_in_int8,
)


def rewrite(
    program: torch.export.ExportedProgram, rewrites: Sequence[Rewrite] = REWRITES
) -> dict[str, int]:
    """Apply the rewrites to the program, in place; return how often each found something."""
    counts = {each.__name__: each(program) for each in rewrites}
    if any(counts.values()):
        program.graph.eliminate_dead_code()
        program.graph_module.recompile()
    return counts
