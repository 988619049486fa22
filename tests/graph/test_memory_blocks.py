"""Tensors are known by the memory behind them."""

import numpy
import torch

from torchfuse.graph.memory_blocks import MemoryBlocks, storage_key


def memory():
    return MemoryBlocks([])


def test_views_and_aliases_are_the_value_of_what_they_view():
    known, x = memory(), torch.randn(4, 4)
    value = known.value_of(x, "call")
    for view in (x[1:], x.t(), x.view(-1), x.detach(), x.data, x.unbind()[2]):
        assert known.value_of(view, "call") == value
    assert known.value_of(x.clone(), "call") != value


def test_the_same_memory_behind_another_storage_is_the_same_value():
    known, x = memory(), torch.randn(4)
    value = known.value_of(x, "call")
    assert known.value_of(torch.from_numpy(x.numpy()), "unknown") == value
    assert known.value_of(torch.from_numpy(numpy.zeros(4)), "unknown") != value


def test_memory_that_was_freed_is_not_taken_for_what_comes_to_lie_there():
    known, seen = memory(), set()
    for _ in range(20):
        seen.add(known.value_of(torch.randn(1000), "call"))
    assert len(seen) == 20


def test_what_is_still_held_is_alive():
    known = memory()
    kept = torch.randn(3)
    value = known.value_of(kept, "call")
    known.value_of(torch.randn(3), "call")
    assert known.alive(0) == [value]
    assert known.alive(value + 1) == []


def test_tensors_apart_in_one_storage_are_values_of_their_own():
    known, vector = memory(), torch.randn(10)
    first, second = vector[:4], vector[4:]
    known.divide([first, second])
    values = [known.value_of(t, "model") for t in (first, second)]
    assert values[0] != values[1]
    assert known.value_of(first.view(2, 2).t(), "unknown") == values[0]
    assert not known.spanned
    known.value_of(vector, "unknown")
    assert known.spanned == [tuple(values)]


def test_tensors_that_overlap_in_one_storage_are_one_value():
    known, vector = memory(), torch.randn(10)
    tensors = [vector[:4], vector[3:], vector]
    known.divide(tensors)
    assert len({known.value_of(t, "model") for t in tensors}) == 1


def test_tensors_without_storage_are_known_as_objects():
    known = memory()
    sparse = torch.eye(3).to_sparse()
    assert storage_key(sparse) < 0
    assert known.value_of(sparse, "call") == known.value_of(sparse, "call")
    assert known.value_of(sparse, "call") != known.value_of(torch.eye(3).to_sparse(), "call")


def test_an_operand_says_how_the_tensor_lies_in_its_memory():
    operand = memory().operand(torch.zeros(4, 6)[1:, ::2], "call")
    assert (operand.shape, operand.stride, operand.offset) == ((3, 3), (6, 2), 6)
    assert operand.dtype == "float32"
    assert operand.numel == 9
