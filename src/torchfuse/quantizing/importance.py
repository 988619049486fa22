"""How much noise in each channel, and in each weight, matters to the model's outputs.

    activations[t][c]   = E Σ_positions (∂(v·y) / ∂t_c)²           v ~ N(0, 1), y the outputs
    weights[l][o, i]    = E Σ_kernel (∂(v·y) / ∂W_oi − μ_i · ∂(v·y) / ∂b_o)²

Independent noise of variance σ² in a channel makes σ² · activations of noise power at the outputs.
A zero is exact in int8, so positions that are zero are left out. A rounding error of a weight is
the same at all positions; what it does to the mean μ of its input, the bias takes back.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from torchfuse.verifying.outputs import copy_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchfuse.cases import Case

__all__ = ["Importance", "by_channel", "importance"]


@dataclass
class Importance:
    """Per node of a graph, `[channels]`: its range on the data, and what noise in it does."""

    low: dict[fx.Node, Tensor] = field(default_factory=dict)
    high: dict[fx.Node, Tensor] = field(default_factory=dict)
    activations: dict[fx.Node, Tensor] = field(default_factory=lambda: defaultdict(_zero))
    weights: dict[fx.Node, Tensor] = field(default_factory=lambda: defaultdict(_zero))

    def largest(self, node: fx.Node) -> Tensor:
        """The largest |value| of each channel."""
        return torch.maximum(-self.low[node], self.high[node]).double()


def importance(
    graph_module: fx.GraphModule, layers: Sequence[fx.Node], data: Sequence[Case]
) -> Importance:
    """Return what noise does in the tensors of an exported graph, and in the weights of `layers`.

    One pass forward and one back for each case.
    """
    generator = torch.Generator().manual_seed(0)
    found = Importance()
    for case in data:
        with torch.enable_grad():
            run = _Recording(graph_module)
            outputs = run.run(*pytree.tree_leaves(copy_tensors((case.args, dict(case.kwargs)))))
            noise = [
                (output * torch.randn(output.shape, generator=generator)).sum()
                for output in pytree.tree_leaves(outputs)
                if isinstance(output, Tensor) and output.requires_grad
            ]
        _add(found, run.values, layers, torch.stack(noise).sum() if noise else None)
    return found


def by_channel(value: Tensor) -> Tensor:
    """`[channels, everything else]`."""
    return value.transpose(0, 1).flatten(1)


class _Recording(fx.Interpreter):
    """Runs the graph with all its tensors kept, each of which a gradient can be asked for."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Return what the node gives; floats that come from outside the graph are leaves."""
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point():
            if n.op in ("placeholder", "get_attr"):
                result = result.detach().clone().requires_grad_()
            self.values[n] = result
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run in-place operators on copies: the value before is asked about too."""
        schema = getattr(target, "_schema", None)
        if schema is not None and schema.is_mutable:
            args = tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)
        return super().call_function(target, args, kwargs)


def _add(
    found: Importance,
    values: dict[fx.Node, Tensor],
    layers: Sequence[fx.Node],
    noise: Tensor | None,
) -> None:
    tensors = [node for node, v in values.items() if node.op != "get_attr" and v.dim() > 1]
    for node in tensors:
        value = values[node].detach()
        extremes = by_channel(value).aminmax(dim=1)
        low, high = found.low.get(node, extremes.min), found.high.get(node, extremes.max)
        found.low[node] = torch.minimum(low, extremes.min)
        found.high[node] = torch.maximum(high, extremes.max)
    asked = [node for node, value in values.items() if value.requires_grad]
    if noise is None or not asked:
        return
    gradients = torch.autograd.grad(noise, [values[n] for n in asked], allow_unused=True)
    by_node = {n: g.double() for n, g in zip(asked, gradients, strict=True) if g is not None}
    for node in tensors:
        if node in by_node:
            counted = by_channel(by_node[node].square() * (values[node].detach() != 0))
            found.activations[node] = found.activations[node] + counted.sum(1)
    for node in layers:
        source, weight, *rest = (arg for arg in node.args[:3] if isinstance(arg, fx.Node))
        if weight not in by_node or source not in values:
            continue
        gradient = by_node[weight].reshape(*by_node[weight].shape[:2], -1)
        if rest and rest[0] in by_node and values[source].dim() > 1:
            mean = by_channel(values[source].detach()).double().mean(1)
            if len(mean) == gradient.shape[1]:
                gradient = gradient - mean[None, :, None] * by_node[rest[0]][:, None, None]
        found.weights[node] = found.weights[node] + gradient.square().sum(2)


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)
