"""Quantization-aware training: int8 is simulated while the user's own loop trains; then converted.

Batch norms stay until the conversion, where they are folded: in training mode they use the batch's
statistics on the fake-quantized conv's output, in evaluation mode the running ones.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from torchfuse.cases import cases, require_finite_tensors, require_float32
from torchfuse.errors import InputError, UnsupportedError, first_line
from torchfuse.isolation.snapshot import random_state_kept
from torchfuse.isolation.warning_filters import known_warnings_ignored
from torchfuse.quantizing import QuantizationResult, static
from torchfuse.quantizing.preconditions import require_forward
from torchfuse.quantizing.quantization_report import QuantizationReport

__all__ = ["TrainableInt8", "convert_qat", "prepare_qat"]


class TrainableInt8(nn.Module):
    """A model with int8 simulated, which trains and evaluates as any module does."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns, its weights and activations rounded as int8 would."""
        return self.graph(*args, **kwargs)

    def train(self, mode: bool = True) -> TrainableInt8:
        """Exchange the graph's dropouts and batch norms for those of the mode."""
        from torchao.quantization.pt2e import (
            move_exported_model_to_eval,
            move_exported_model_to_train,
        )

        self.training = mode
        (move_exported_model_to_train if mode else move_exported_model_to_eval)(self.graph)
        return self


def prepare_qat(model: nn.Module, example_inputs: Any) -> TrainableInt8:
    """Return a copy of `model` that computes as if in int8, to be trained by your own loop.

    `.train()` and `.eval()` work on it, `.parameters()` are those to train, and the batch size is
    free. `model` is unchanged. When trained, give it to `convert_qat`.

    Raises:
        InputError: no model as it was written, or one with weights in another precision than
            float32, NaN or Inf.
        UnsupportedError: torch.export cannot capture the model in training mode.
    """
    static.require_quantizer()
    if not isinstance(model, nn.Module) or isinstance(model, fx.GraphModule):
        raise InputError(
            f"Expected a model as it was written, a torch.nn.Module, got {type(model).__name__}."
        )
    require_float32(model)
    require_finite_tensors(model)
    case = cases(example_inputs)[0]
    require_forward([case])
    leaves, spec = pytree.tree_flatten((case.args, dict(case.kwargs)))
    doubled = [_batch_of_two(leaf) for leaf in leaves]
    free = [
        {0: torch.export.Dim.AUTO} if isinstance(leaf, torch.Tensor) else None for leaf in leaves
    ]
    args, kwargs = pytree.tree_unflatten(doubled, spec)
    shapes = static.by_argument_name(model, *pytree.tree_unflatten(free, spec))
    with known_warnings_ignored(), random_state_kept():
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

        training = copy.deepcopy(model).train()
        try:
            program = torch.export.export(training, args, kwargs, dynamic_shapes=shapes)
        except Exception as error:
            raise UnsupportedError(
                f"torch.export cannot capture {type(model).__name__} in training mode: "
                f"{first_line(error)}."
            ) from error
        config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
        quantizer = XNNPACKQuantizer().set_global(config)
        graph = program.module(check_guards=False)
        with static.as_xnnpack_runs_it(graph):
            prepared: fx.GraphModule = prepare_qat_pt2e(graph, quantizer)
    return TrainableInt8(prepared)


def convert_qat(trained: nn.Module) -> QuantizationResult:
    """Return what `prepare_qat` made, now trained, in int8, ready for `export`; it is unchanged.

    Raises:
        InputError: it was not made by `prepare_qat`, or training left NaN or Inf in its weights.
    """
    if not isinstance(trained, TrainableInt8):
        raise InputError(
            "Expected a model that torchfuse.prepare_qat made, with observers in it, got "
            f"{type(trained).__name__}."
        )
    require_finite_tensors(trained.graph)
    with known_warnings_ignored(), random_state_kept():
        int8 = static.converted(copy.deepcopy(trained).eval().graph)
    report = QuantizationReport("int8, trained", None, None, (), (), (), ())
    return QuantizationResult(int8, tuple(static.layers_of(int8)), report)


def _batch_of_two(leaf: Any) -> Any:
    """The batch norm's statistics and torch.export both need more than one sample."""
    if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == 1:
        return torch.cat([leaf, leaf])
    return leaf
