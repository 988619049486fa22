"""Lowering to ExecuTorch without work that leaves no trace in the program.

Each piece of waste is one context manager, with what it costs and why leaving it out is safe.
`benchmarks/lowering.py` measures them and asserts that the bytes stay the same.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.fx.traceback import NodeSource

__all__ = ["without_waste"]


@contextlib.contextmanager
def without_waste() -> Iterator[None]:
    """Everything in this file."""
    with _shared_node_sources():
        yield


@contextlib.contextmanager
def _shared_node_sources() -> Iterator[None]:
    """Share a node's history instead of copying it.

    Every pass gives every new node a NodeSource, which deep-copies the history of the node it
    came from: the n-th pass copies n records per node. They are values (compared and hashed by
    content, never changed once made), so a copy can be the record itself.
    """
    if hasattr(NodeSource, "__deepcopy__"):  # nested, or torch has its own by now
        yield
        return

    def itself(source: NodeSource, _memo: dict[int, Any]) -> NodeSource:
        return source

    NodeSource.__deepcopy__ = itself  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del NodeSource.__deepcopy__  # type: ignore[attr-defined]
