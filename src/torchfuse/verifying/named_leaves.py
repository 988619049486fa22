"""The tensors and numbers inside nested outputs, each with the path that leads to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["named_leaves"]


def named_leaves(value: Any, name: str = "output") -> Iterator[tuple[str, Any]]:
    """Yields (name, leaf) in order: `output`, `output[0]`, `output['logits'][1]`, `output.loss`.

    Mappings, lists, tuples, sets' members in iteration order, dataclasses, and objects with
    attributes of their own are entered; everything else (tensors, numbers, strings, None) is a
    leaf. A container that contains itself is entered once.
    """
    yield from _walk(value, name, frozenset())


def _walk(value: Any, name: str, inside: frozenset[int]) -> Iterator[tuple[str, Any]]:
    children = _children(value)
    if children is None:
        yield name, value
    elif id(value) not in inside:
        for suffix, child in children:
            yield from _walk(child, name + suffix, inside | {id(value)})


def _children(value: Any) -> list[tuple[str, Any]] | None:
    if value is None or isinstance(value, (str, bytes, bool, int, float, complex, type)):
        return None
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", child) for key, child in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{field}", getattr(value, field)) for field in value._fields]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [(f"[{index}]", child) for index, child in enumerate(value)]
    if dataclasses.is_dataclass(value):
        return [(f".{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value)]
    # A tensor has attributes too, but is what we look for; so is anything array-like.
    if hasattr(value, "shape") or callable(value):
        return None
    attributes = getattr(value, "__dict__", None)
    return [(f".{key}", child) for key, child in attributes.items()] if attributes else None
