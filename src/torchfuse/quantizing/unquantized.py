"""What was not quantized although that was asked for: most of a model, or all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchfuse.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import fx

    from torchfuse.quantizing.static import QuantizedLayer

__all__ = ["in_float", "mostly_float", "quantized_share", "require_quantized"]

_MOST = 0.5  # of the layers' weights: with more of them in float, a file is hardly smaller
_SHOWN = 8  # names in a sentence


def in_float(layers: Iterable[QuantizedLayer]) -> tuple[str, ...]:
    """Return the layers that do not compute in int8, each with its operator."""
    return tuple(
        f"{layer.module or 'the model itself'} ({layer.operator})"
        for layer in layers
        if not layer.int8
    )


def quantized_share(layers: Sequence[QuantizedLayer]) -> float | None:
    """Return the share of the layers' weights that are quantized, 0 to 1; None: there are none."""
    total = sum(layer.weights for layer in layers)
    return sum(layer.weights for layer in layers if layer.int8) / total if total else None


def mostly_float(layers: Sequence[QuantizedLayer], scheme: str = "int8") -> str | None:
    """Return what is in float, and why, if it holds most of the layers' weights; else None."""
    share = quantized_share(layers)
    if share is None or share >= _MOST:
        return None
    return f"{share:.0%} of the layers' weights are quantized; {_left(layers, scheme)}"


def require_quantized(graph: fx.Graph, layers: Sequence[QuantizedLayer], scheme: str) -> None:
    """Raise UnsupportedError if nothing at all in the graph is quantized."""
    if any("quantize" in str(node.target) for node in graph.nodes):
        return
    why = f"it has no layer that {scheme} takes"
    raise UnsupportedError(
        f"Nothing in this model was quantized: {_left(layers, scheme) if layers else why}; export "
        "it with precision='fp16', or as it is."
    )


def _left(layers: Sequence[QuantizedLayer], scheme: str) -> str:
    names = list(dict.fromkeys(in_float(layers)))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    operators = dict.fromkeys(layer.operator for layer in layers if not layer.int8)
    # What a scheme takes may be in float too: on request, or since its sizes do not fit.
    taken = ("conv", "linear") if scheme.split()[0] == "int8" else ("linear",)
    never = [name for name in operators if not name.startswith(taken)]
    why = f", since {scheme} takes no {' and no '.join(never)}" if never else ""
    return f"computed in float: {', '.join(names[:_SHOWN])}{more}{why}"
