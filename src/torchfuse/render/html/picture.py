"""The model's graph as the report's script draws it: nodes, edges, and what became of each node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchfuse.units import decibels, duration, percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchfuse.comparing.comparison import Comparison, Operation
    from torchfuse.delegation import Delegation

__all__ = ["legend", "picture"]

# What a kind of call is called in a delegate's list of operators, where that differs.
_OPERATORS = {
    "conv": "convolution",
    "conv_transpose": "convolution",
    "linear": "linear",
    "batch_norm": "_native_batch_norm_legit_no_training",
    "relu6": "hardtanh",
    "adaptive_avg_pool2d": "mean",
    "flatten": "view_copy",
}


_WITH_WEIGHTS = ("conv", "conv_transpose", "linear", "matmul")


def picture(comparison: Comparison) -> dict[str, Any]:
    """Return the graph before and after, for each node its state in each way of colouring."""
    return {
        "before": _nodes(comparison.before, comparison),
        "after": _nodes(comparison.after, comparison),
    }


def legend(comparison: Comparison) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Return the ways of colouring that there is data for: name, title, states with titles."""
    found = []
    if comparison.plan is not None:
        states = [("merged", "merged by a fusion"), ("skipped", "skipped, with a reason")]
        found.append(("fusing", "What fusing did", states))
    if comparison.in_int8:
        states = [("int8", "computes in int8"), ("float", "has weights, in float")]
        found.append(("precision", "What computes in int8", states))
    if _delegation(comparison) is not None:
        states = [("inside", "run by the delegate"), ("outside", "left outside")]
        found.append(("delegate", "What the delegate runs", states))
    if any(op.time_s is not None for op in comparison.before):
        states = [("share", "darker: more of the time in eager mode")]
        found.append(("time", "Where the time goes", states))
    if comparison.layers:
        states = [("share", f"darker: more noise, from {_QUIET_DB:g} dB down")]
        found.append(("noise", "Where int8 makes noise", states))
    return found


_QUIET_DB = 50.0  # above, nobody looks
_DARKEST = 0.12  # of what is shown darkest: an eighth of all the time


def _delegation(comparison: Comparison) -> Delegation | None:
    for precision in ("int8", "fp32"):
        for row in comparison.rows:
            if row.precision == precision and row.delegation is not None:
                return row.delegation
    return None


def _nodes(operations: Sequence[Operation], comparison: Comparison) -> list[dict[str, Any]]:
    plan = comparison.plan
    merged = {m for fusion in (plan.fusions if plan else ()) for m in fusion.modules}
    skipped = {m: skip.reason for skip in (plan.skips if plan else ()) for m in skip.modules}
    in_int8 = set(comparison.in_int8)
    noise = {layer.module: layer.sqnr_db for layer in comparison.layers}
    delegation = _delegation(comparison)
    left = {op.operator for op in delegation.left} if delegation else set()
    total_s = sum(op.time_s or 0 for op in operations)
    nodes = []
    for index, operation in enumerate(operations):
        module = operation.module
        states = {}
        facts = [("shape", "×".join(map(str, operation.sizes)) or "scalar")]
        if module in merged:
            states["fusing"] = "merged"
        elif module in skipped:
            states["fusing"] = "skipped"
            facts.append(("not fused", skipped[module]))
        if in_int8 and operation.kind in _WITH_WEIGHTS:
            states["precision"] = "int8" if module in in_int8 else "float"
        if delegation is not None:
            name = _OPERATORS.get(operation.kind, operation.kind)
            states["delegate"] = "outside" if name in left else "inside"
        shares = {}
        if module in noise and operation.kind in _WITH_WEIGHTS:
            facts.append(("noise in int8", decibels(noise[module])))
            quiet = max(0.0, min(noise[module], _QUIET_DB)) / _QUIET_DB
            shares["noise"] = round((1 - quiet) * _DARKEST, 4)
        if operation.time_s is not None and total_s:
            share = operation.time_s / total_s
            facts.append(("time", f"{duration(operation.time_s)}, {percent(share, 1)}"))
            shares["time"] = round(share, 4)
        nodes.append(
            {
                "id": index,
                "kind": operation.kind,
                "module": module,
                "inputs": list(operation.inputs),
                "states": states,
                "shares": shares,
                "facts": facts,
            }
        )
    return nodes
