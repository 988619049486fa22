"""A deep copy of a model, or one sentence on why there is none."""

import copy
from collections import defaultdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torchfuse.errors import UnsupportedError, first_line

__all__ = ["copied"]

Model = TypeVar("Model", bound=nn.Module)


def copied(model: Model) -> Model:
    """Return a copy of `model` that can be changed while `model` stays as it is.

    Tensors that autograd computed (old-style weight norms) are copied as values; parameters that
    are views of one memory stay such.

    Raises:
        UnsupportedError: a part of it cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    _copy_shared_memory(model, memo)
    try:
        with torch.inference_mode(False):
            return copy.deepcopy(model, memo)
    except Exception as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be copied ({first_line(error)}), and the model itself "
            "must stay as it is; leave out what copy.deepcopy cannot copy: locks, open files."
        ) from error


def _copy_shared_memory(model: nn.Module, memo: dict[int, Any]) -> None:
    """Copy parameters that are views of one memory as such; copy.deepcopy would separate them."""
    sharing: dict[int, dict[int, nn.Parameter]] = defaultdict(dict)
    for parameter in model.parameters():
        if parameter.layout is torch.strided:
            sharing[parameter.untyped_storage()._cdata][id(parameter)] = parameter
    for parameters in sharing.values():
        if len(parameters) > 1:
            storage = next(iter(parameters.values())).untyped_storage().clone()
            for key, parameter in parameters.items():
                view = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
                view.set_(storage, parameter.storage_offset(), parameter.shape, parameter.stride())
                memo[key] = nn.Parameter(view, requires_grad=parameter.requires_grad)
