"""What a file says of how it came to be: what it was compared on, calibrated on, and in int8 where.

It is kept in the seal, for `torchfuse info` and for whoever gets the file without the model.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from torch import fx

from torchfuse.quantizing.calibration import CALIBRATED
from torchfuse.quantizing.static import is_quantized_graph, layers_of

if TYPE_CHECKING:
    from torch import nn

    from torchfuse.verifying.equivalence import Equivalence

__all__ = ["provenance"]

_LONGEST = 8_192  # characters of names: in a .pt all metadata is a zip comment of 64 KiB at most


def provenance(
    reference: nn.Module,
    model: nn.Module,
    verified_on: str,
    found: Equivalence,
    calibrated: str | None,
) -> dict[str, Any]:
    """Return it as plain data.

    `reference` is what was lowered, `model` what the file was compared with, `verified_on` on
    what, in words.
    """
    is_quantized = isinstance(model, fx.GraphModule) and is_quantized_graph(model.graph)
    name = "the quantized model" if is_quantized else type(model).__name__
    entries: dict[str, Any] = {
        "verified": {
            "against": name,
            "on": verified_on,
            "max_rel": _finite(found.max_rel),
            "sqnr_db": _finite(found.sqnr_db),  # None: equal
        }
    }
    if not isinstance(reference, fx.GraphModule) or not is_quantized_graph(reference.graph):
        return entries
    calibrated = calibrated or reference.meta.get(CALIBRATED)
    if calibrated is not None:
        entries["calibrated_on"] = calibrated
    layers = list(layers_of(reference))
    in_float = [layer.module for layer in layers if not layer.int8]
    by_precision: dict[str, Any] = {"int8": len(layers) - len(in_float), "float": len(in_float)}
    if len(json.dumps(in_float)) <= _LONGEST:
        by_precision["in_float"] = in_float
    entries["layers"] = by_precision
    return entries


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
