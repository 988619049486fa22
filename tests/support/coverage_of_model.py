"""What fusing does to one model of the zoo, beside what the exported graph says is possible."""

import time
from dataclasses import dataclass

import torch

import torchfuse
from support.foldable import count
from support.zoo import Entry


@dataclass(frozen=True)
class Coverage:
    """One row of the coverage table."""

    model: str
    batch_norms: int  # called in one pass
    expected: int  # foldable, by the exported graph
    folded: int
    max_rel: float | None  # worst output, inputs other than those planned on; None: not comparable
    fuse_s: float  # planning, fusing and proving
    skips: tuple[str, ...]  # "modules: reason"


def coverage(entry: Entry) -> Coverage:
    """Return the row of `entry`: planned on one batch, compared on another of another size."""
    model = entry.model()
    counted = count(model, entry.inputs())
    began = time.perf_counter()
    result = torchfuse.fuse(model, entry.inputs())
    seconds = time.perf_counter() - began
    with torch.no_grad():
        check = torchfuse.verify(model, result.model, [entry.inputs(3, seed=3), entry.inputs(1)])
    before, after = _batch_norms(model), _batch_norms(result.model)
    return Coverage(
        entry.name,
        counted.batch_norms,
        counted.foldable,
        before - after,
        check.max_rel,
        round(seconds, 3),
        tuple(f"{' + '.join(skip.modules)}: {skip.reason}" for skip in result.plan.skips),
    )


def _batch_norms(model: torch.nn.Module) -> int:
    kinds = torch.nn.modules.batchnorm._BatchNorm
    return sum(isinstance(module, kinds) or _is_frozen(module) for module in model.modules())


def _is_frozen(module: torch.nn.Module) -> bool:
    """Return whether it is a frozen batch norm, as detectors hold them: no nn.BatchNorm2d."""
    return "BatchNorm" in type(module).__name__ and hasattr(module, "running_var")
