"""A deep copy of a model, or one sentence on why there is none."""

import copy
from typing import TypeVar

from torch import nn

from torchfuse.errors import UnsupportedError, first_line

__all__ = ["copied"]

Model = TypeVar("Model", bound=nn.Module)


def copied(model: Model) -> Model:
    """Return a copy of `model` that can be changed while `model` stays as it is.

    Raises:
        UnsupportedError: a part of it cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be copied ({first_line(error)}), and the model itself "
            "must stay as it is; leave out what copy.deepcopy cannot copy: locks, open files."
        ) from error
