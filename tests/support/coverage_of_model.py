"""What fusing does to one model, beside what the exported graph says is possible."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

import torchfuse
from support import foldable
from support.zoo import Entry
from torchfuse.errors import first_line
from torchfuse.fusing.proving.whole import widened

ROUNDING = 1e-4  # max|a − b| / max|a| in float32; what is beyond is decided in float64
EXACT = 1e-9  # likewise, in float64


@dataclass(frozen=True)
class Folded:
    """What `fuse` or `fuse_exported` did."""

    norms: int  # batch norms that are gone
    max_rel: float | None  # worst output, on inputs not planned on; None: not comparable
    dtype: str  # in which that was decided: "float32", "float64"

    @property
    def agrees(self) -> bool:
        """Whether the outputs are the same but for rounding."""
        allowed = EXACT if self.dtype == "float64" else ROUNDING
        return self.max_rel is not None and self.max_rel <= allowed


@dataclass(frozen=True)
class Coverage:
    """One row of the coverage table."""

    model: str
    batch_norms: int | None  # called in one pass; None: torch.export cannot take the model
    expected: int | None  # foldable, by the exported graph
    fuse: Folded
    fuse_s: float  # planning, fusing and proving
    fuse_exported: Folded | None
    in_programs: int  # norms that `fuse` leaves, and says are folded with `graph=True`
    skips: tuple[str, ...]  # "modules: reason"
    not_exported: str = ""  # why

    @property
    def falls_short(self) -> str:
        """What is less than it should be; empty if nothing is."""
        sides = [
            ("fuse", self.fuse, self.in_programs),
            ("fuse_exported", self.fuse_exported, 0),
        ]
        return ", ".join(
            name
            for name, folded, left in sides
            if folded is not None
            and (folded.norms + left < (self.expected or 0) or not folded.agrees)
        )


def coverage(entry: Entry) -> Coverage:
    """Return the row of `entry` by `fuse`: planned on one batch, compared on others."""
    others = [(entry.inputs(3, seed=3),), (entry.inputs(1),)]
    return _row(entry.name, entry.model(), (entry.inputs(),), others, exported=False)


def coverage_of(name: str, model: nn.Module, inputs: Callable[[int], tuple[Any, ...]]) -> Coverage:
    """Return the row of a model, by `fuse` and `fuse_exported`; `inputs` gives so many examples."""
    return _row(name, model, inputs(2), [tuple(value[2:4] for value in inputs(4))], exported=True)


def _row(
    name: str, model: nn.Module, given: tuple[Any, ...], others: list[Any], *, exported: bool
) -> Coverage:
    program, why_not = None, ""
    try:
        program = foldable.exported(model, given)
    except Exception as error:  # noqa: BLE001  # whatever torch.export raises
        why_not = first_line(error)
    counted = None if program is None else foldable.count_in(program)
    began = time.perf_counter()
    result = torchfuse.fuse(model, given)
    seconds = time.perf_counter() - began
    skips = tuple(f"{' + '.join(skip.modules)}: {skip.reason}" for skip in result.plan.skips)
    return Coverage(
        name,
        None if counted is None else counted.batch_norms,
        None if counted is None else counted.foldable,
        _folded_in_module(model, result.model, given, others),
        round(seconds, 3),
        _folded_in_program(model, program, given, others) if program and exported else None,
        sum("graph=True" in (skip.hint or "") for skip in result.plan.skips),
        skips,
        why_not,
    )


def _folded_in_module(
    model: nn.Module, fused: nn.Module, given: tuple[Any, ...], others: list[Any]
) -> Folded:
    norms = _batch_norms(model) - _batch_norms(fused)

    def in_float64() -> tuple[nn.Module, nn.Module]:
        wide = copy.deepcopy(model).double()
        return wide, torchfuse.fuse(wide, widened(given)).model

    return _decided(norms, (model, fused), others, in_float64)


def _folded_in_program(
    model: nn.Module, program: ExportedProgram, given: tuple[Any, ...], others: list[Any]
) -> Folded:
    fused = torchfuse.fuse_exported(program).model
    norms = foldable.count_in(program).batch_norms - foldable.count_in(fused).batch_norms

    def in_float64() -> tuple[nn.Module, nn.Module]:
        wide = copy.deepcopy(model).double()
        return wide, torchfuse.fuse_exported(foldable.exported(wide, widened(given))).model.module()

    return _decided(norms, (model, fused.module()), others, in_float64)


def _decided(
    norms: int,
    models: tuple[nn.Module, nn.Module],
    others: list[Any],
    in_float64: Callable[[], tuple[nn.Module, nn.Module]],
) -> Folded:
    """Compare on the other inputs; a model that amplifies rounding is compared in float64."""
    with torch.no_grad():
        found = Folded(norms, torchfuse.verify(*models, others).max_rel, "float32")
        if found.agrees:
            return found
        return Folded(norms, torchfuse.verify(*in_float64(), widened(others)).max_rel, "float64")


def _batch_norms(model: nn.Module) -> int:
    """How many norms have statistics; a class that does more than the norm stays without them."""
    return sum(
        getattr(module, "running_var", None) is not None and "BatchNorm" in _names(module)
        for module in model.modules()
    )


def _names(module: nn.Module) -> str:
    """The names of its classes: a frozen batch norm, as detectors hold them, is none of torch's."""
    return " ".join(base.__name__ for base in type(module).__mro__)
