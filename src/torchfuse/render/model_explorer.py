"""A comparison's graph for Model Explorer, and what was measured of its nodes as files beside it.

Model Explorer reads a list of graphs, and for each file of node data a dict from the graph's id to
results by the node's id, with a gradient from the least value (0) to the largest (1).
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchfuse.comparing.comparison import Comparison, Operation

__all__ = ["model_explorer_files"]

_LIGHT, _DARK = "#ffffff", "#ff9f5c"
_WITH_WEIGHTS = ("conv", "conv_transpose", "linear", "matmul")


def model_explorer_files(comparison: Comparison) -> dict[str, str]:
    """Return text by file name: the graph, and the times in ms and noises in dB that are known.

    `model-explorer graph.json --node_data_paths=time_ms.json,noise_db.json` shows them.
    """
    graphs = {"before": comparison.before, "after": comparison.after}
    graphs = {name: operations for name, operations in graphs.items() if operations}
    times = {name: _times_ms(operations) for name, operations in graphs.items()}
    # int8 is made of the model itself: its layers have the names they had before.
    noises = {"before": _noises_db(comparison)} if "before" in graphs else {}
    found = {"graph.json": _text([_graph(name, calls) for name, calls in graphs.items()])}
    for name, values, least_is_dark in (
        ("time_ms.json", times, False),
        ("noise_db.json", noises, True),
    ):
        if any(values.values()):
            found[name] = _text(
                {graph: _node_data(by_node, least_is_dark) for graph, by_node in values.items()}
            )
    return found


def _graph(name: str, operations: Sequence[Operation]) -> dict[str, Any]:
    return {
        "id": name,
        "nodes": [
            {
                "id": str(index),
                "label": operation.kind,
                "namespace": operation.module.replace(".", "/"),
                "attrs": [{"key": "module", "value": operation.module}],
                "incomingEdges": [
                    {
                        "sourceNodeId": str(source),
                        "sourceNodeOutputId": "0",
                        "targetNodeInputId": str(position),
                    }
                    for position, source in enumerate(operation.inputs)
                ],
                "outputsMetadata": [
                    {
                        "id": "0",
                        "attrs": [
                            {"key": "tensor_shape", "value": "×".join(map(str, operation.sizes))}
                        ],
                    }
                ],
            }
            for index, operation in enumerate(operations)
        ],
    }


def _node_data(values: Mapping[str, float], least_is_dark: bool) -> dict[str, Any]:
    first, last = (_DARK, _LIGHT) if least_is_dark else (_LIGHT, _DARK)
    return {
        "results": {node: {"value": value} for node, value in values.items()},
        "gradient": [{"stop": 0, "bgColor": first}, {"stop": 1, "bgColor": last}],
    }


def _times_ms(operations: Sequence[Operation]) -> dict[str, float]:
    return {
        str(index): round(operation.time_s * 1e3, 6)
        for index, operation in enumerate(operations)
        if operation.time_s is not None
    }


def _noises_db(comparison: Comparison) -> dict[str, float]:
    by_module = {layer.module: layer.sqnr_db for layer in comparison.layers}
    return {
        str(index): by_module[operation.module]
        for index, operation in enumerate(comparison.before)
        if operation.kind in _WITH_WEIGHTS
        # What is exact has no place on the gradient: it keeps the colour of what is not measured.
        and math.isfinite(by_module.get(operation.module, math.inf))
    }


def _text(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
