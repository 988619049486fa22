"""The inputs that a model file is run on where none are given: like the example it was made for.

Their shapes and types are kept in the file; values are not, and are ones when it is run. Kept is
what `runner.runtimes.decoded` reads: `{"ones": [1, 3, 224, 224], "dtype": "float32"}` for a tensor.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from torchfuse.cases import Case
from torchfuse.errors import InputError
from torchfuse.targets.calling import Model
from torchfuse.targets.target import CheckedFile

__all__ = ["described", "inputs_of", "ones_like"]

_LONGEST = 16_384  # characters of JSON: in a .pt the metadata is a zip comment of 64 KiB at most


def described(case: Case) -> dict[str, Any] | None:
    """Return the shapes and types of a call's arguments as plain data; None: it is more than that.

    >>> described(Case((torch.zeros(1, 3),), {"flip": True}))
    {'args': [{'ones': [1, 3], 'dtype': 'float32'}], 'kwargs': {'flip': True}}
    """
    try:
        found = {
            "args": [_described(arg) for arg in case.args],
            "kwargs": {name: _described(value) for name, value in case.kwargs.items()},
        }
    except TypeError:
        return None
    return found if len(json.dumps(found)) <= _LONGEST else None


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.is_complex():
            raise TypeError("ones of its kind are not to be had")
        return {"ones": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if type(value) is list:
        return [_described(item) for item in value]
    if type(value) is tuple:
        return {"tuple": [_described(item) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _described(item) for key, item in value.items()}}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{type(value).__name__} is no plain data")


def ones_like(kept: Mapping[str, Any]) -> Case:
    """Return the call that `described` was given, its tensors with ones in them."""
    return Case(
        tuple(_made(arg) for arg in kept["args"]),
        {name: _made(value) for name, value in kept["kwargs"].items()},
    )


def _made(value: Any) -> Any:
    if isinstance(value, list):
        return [_made(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if "tuple" in value:
        return tuple(_made(item) for item in value["tuple"])
    if "dict" in value:
        return {key: _made(item) for key, item in value["dict"].items()}
    return torch.ones(value["ones"], dtype=getattr(torch, value["dtype"]))


def inputs_of(file: CheckedFile, model: Callable[..., Any]) -> Case:
    """Return inputs for the model in the file, as far as the file knows any, of ones.

    A program that says nothing else gets the sizes that memory is planned for: the largest.

    Raises:
        InputError: the file does not know.
    """
    kept = (file.metadata or {}).get("inputs")
    if kept is not None:
        return ones_like(kept)
    case = model.largest_ones() if isinstance(model, Model) else None
    if case is None:
        raise InputError(
            f"'{file.path}' does not say what inputs it takes, as files of 'torchfuse export' do; "
            "give their sizes and types: --input 1x3x224x224, and :int64 or the like after it "
            "unless it is float32."
        )
    return case
