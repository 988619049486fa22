"""Which value a tensor views: tensors are known by the memory behind them, not as objects."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from torchfuse.graph import Operand, Value

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["MemoryBlocks", "storage_key"]


def storage_key(tensor: Tensor) -> int:
    """A number for the storage that `tensor` views; below 0 if it has none (sparse, functorch)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return -id(tensor)


# So many blocks are looked through without asking which of them were freed.
_FEW = 512


class MemoryBlocks:
    """The blocks of memory that were seen, each with the index of its value in `values`."""

    def __init__(self, values: list[Value]) -> None:
        self.values = values
        self.spanned: list[tuple[int, ...]] = []  # values that one tensor was seen to view at once
        self._ids: dict[int, int] = {}  # address of a storage → value
        # Storages that several parameters lie in, apart from each other: (start, end, value)
        self._parts: dict[int, list[tuple[int, int, int]]] = {}
        # A weak reference frees the memory but keeps the address from being used again.
        self._weak: list[StorageWeakRef | None] = []
        # Addresses of blocks that may be held by something, each with its value. Most of a loop's
        # thousands are freed: they are dropped when there are twice as many as after last time.
        self._ranges: list[tuple[int, int, int]] = []
        self._enough = _FEW
        self._twins: list[StorageWeakRef] = []
        self._kept: list[Tensor] = []  # tensors without storage, identified as objects

    def copied(self, values: list[Value]) -> MemoryBlocks:
        """The same blocks, for a copy of their values."""
        other = MemoryBlocks(values)
        other._ids = {**self._ids}
        other._parts = self._parts  # (`divide` is done, and nothing else adds to them)
        other._weak, other._ranges = [*self._weak], [*self._ranges]
        other._enough = self._enough
        other._twins, other._kept = [*self._twins], [*self._kept]
        return other

    def divide(self, tensors: Iterable[Tensor]) -> None:
        """Makes values of their own of what does not overlap, although it shares a storage.

        `torch.nn.utils.vector_to_parameters` leaves parameters so; they are tied in no way.
        """
        extents: dict[int, set[tuple[int, int]]] = defaultdict(set)
        known: dict[int, Tensor] = {}
        for tensor in tensors:
            if tensor.layout is torch.strided and not tensor.is_nested and tensor.numel():
                key = storage_key(tensor)
                if key >= 0:
                    extents[key].add(_extent(tensor))
                    known[key] = tensor
        for key, found in extents.items():
            blocks = _apart(found)
            if len(blocks) > 1:
                storage = known[key].untyped_storage()
                start = storage.data_ptr()
                self._parts[key] = [
                    (low, high, self._new(None, StorageWeakRef(storage), "model", start, low, high))
                    for low, high in blocks
                ]

    def value_of(self, tensor: Tensor, origin: str) -> int:
        """The value that `tensor` views; a new one, of the given origin, if it is not known."""
        key = storage_key(tensor)
        if key < 0:
            known = self._ids.get(key)
            if known is None:
                self._kept.append(tensor)
                known = self._new(key, None, "unknown", 0, 0, 0)
            return known
        if key in self._parts:
            return self._part_of(key, tensor)
        known = self._ids.get(key)
        if known is not None:
            return known
        storage = tensor.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        if origin == "unknown" and (twin := self._overlapping(start, start + size)) is not None:
            # The same memory behind another storage (DLPack, numpy): the same value.
            self._ids[key] = twin
            self._twins.append(StorageWeakRef(storage))
            return twin
        return self._new(key, StorageWeakRef(storage), origin, start, 0, size)

    def operand(self, tensor: Tensor, origin: str) -> Operand:
        """`tensor` as a call sees it."""
        index = self.value_of(tensor, origin)
        dtype = _name_of(tensor.dtype)
        if tensor.is_nested:  # it has no shape
            return Operand(index, (), (), 0, dtype)
        if tensor.layout is not torch.strided:
            return Operand(index, tuple(tensor.shape), (), 0, dtype)
        return Operand(
            index, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), dtype
        )

    def alive(self, since: int) -> list[int]:
        """The values from index `since` on whose memory is still held by something."""
        return [index for index in range(since, len(self._weak)) if self._is_held(index)]

    def forget_objects(self) -> None:
        """Lets go of tensors without storage."""
        self._ids = {key: index for key, index in self._ids.items() if key >= 0}
        self._kept.clear()

    def _new(
        self,
        key: int | None,
        weak: StorageWeakRef | None,
        origin: str,
        start: int,
        low: int,
        high: int,
    ) -> int:
        index = len(self.values)
        if key is not None:
            self._ids[key] = index
        self._weak.append(weak)
        if start:
            self._ranges.append((start + low, start + high, index))
        self.values.append(Value(index, origin))
        return index

    def _part_of(self, key: int, tensor: Tensor) -> int:
        parts = self._parts[key]
        if not tensor.numel():
            return parts[0][2]
        start, end = _extent(tensor)
        found = tuple(value for low, high, value in parts if start < high and low < end)
        if len(found) != 1:
            self.spanned.append(found or tuple(value for _, _, value in parts))
        return (found or (parts[0][2],))[0]

    def _overlapping(self, start: int, end: int) -> int | None:
        if start == 0:
            return None
        if len(self._ranges) > self._enough:
            self._ranges = [block for block in self._ranges if self._is_held(block[2])]
            self._enough = max(_FEW, 2 * len(self._ranges))
        for low, high, index in reversed(self._ranges):
            if start < high and low < end and self._is_held(index):
                return index
        return None

    def _is_held(self, index: int) -> bool:
        weak = self._weak[index]
        return weak is not None and not weak.expired()


@cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte in the storage that `tensor` views, and the one after the last."""
    size = tensor.element_size()
    last = sum(
        (count - 1) * step for count, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    start = int(tensor.storage_offset()) * size
    return start, start + (last + 1) * size


def _apart(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Blocks that hold what overlaps, and do not overlap each other."""
    blocks: list[tuple[int, int]] = []
    for low, high in sorted(extents):
        if blocks and low < blocks[-1][1]:
            blocks[-1] = (blocks[-1][0], max(high, blocks[-1][1]))
        else:
            blocks.append((low, high))
    return blocks
