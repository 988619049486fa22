"""Other inputs like those that a model was given: a wrong fold may not show on a single one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from torchfuse.cases import Case, resized

__all__ = ["other_inputs", "variations"]


def other_inputs(case: Case, seed: int) -> Case:
    """A case like `case` with other values: random floats of like spread, integers permuted."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def other(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.numel() == 0 or value.layout is not torch.strided:
                return value.clone()
            if value.is_floating_point():
                spread, centre = torch.std_mean(value.float(), correction=0)
                noise = torch.randn(value.shape, generator=generator, device="cpu")
                return torch.empty_like(value).copy_(noise).mul_(spread + 1e-3).add_(centre)
            order = torch.randperm(value.numel(), generator=generator, device="cpu")
            order = order.to(value.device)
            return torch.empty_like(value).copy_(value.flatten()[order].reshape(value.shape))
        if type(value) in (list, tuple):
            return type(value)(other(entry) for entry in value)
        if type(value) is dict:
            return {key: other(entry) for key, entry in value.items()}
        return copy.deepcopy(value)

    with torch.no_grad():
        return Case(other(case.args), other(dict(case.kwargs)), case.method)


def variations(case: Case) -> list[Case]:
    """Cases like `case`: other values; other values at another batch size and half the size."""
    others: list[Case] = []
    for batch, spatial in ((False, False), (True, True), (True, False)):
        other = resized(case, batch=batch, spatial=spatial)
        if str(other) not in map(str, others):
            others.append(other_inputs(other, seed=len(others)))
    return others
