"""Proves fusions: each on what the original computes, then the whole model on several inputs."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchfuse.checking import compare_outputs, copied_leaves, copy_tensors, is_finite, run
from torchfuse.equivalence import Equivalence
from torchfuse.inputs import Case, resized
from torchfuse.restoring import restored
from torchfuse.surgery import folded_layer, plain_layer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torchfuse.equivalence import OutputDifference
    from torchfuse.rules import Match, Rule

    _Rewrite = Callable[[nn.Module, nn.Module], tuple[Tensor, Tensor]]

__all__ = [
    "PairDifference",
    "PairProof",
    "compare",
    "decided",
    "is_blurred",
    "is_finite",
    "other_inputs",
    "outputs_of",
    "rounding",
    "unwrapped",
    "variations",
    "widened",
    "widened_case",
    "within",
]

# What rounding may do to one layer, as max|a − b| / max|a|; beyond it, float64 decides.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}
# A fold may be this much less exact than the original, measured against float64.
_WORSE = 4.0
# It rounds in every layer, and so may move outputs further than one rounding of the inputs does.
_ROUNDINGS = 100.0


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
    others = [other_inputs(case, seed=1)]
    for batch, spatial in ((True, True), (True, False)):
        other = resized(case, batch=batch, spatial=spatial)
        if str(other) not in {str(case), *map(str, others)}:
            others.append(other_inputs(other, seed=2))
    return others


def is_blurred(outputs: Sequence[dict[str, Any]]) -> bool:
    """Whether some output is in a dtype whose rounding could hide a wrong fold."""
    half = (torch.float16, torch.bfloat16)
    return any(
        isinstance(leaf, Tensor) and leaf.dtype in half
        for output in outputs
        for leaf in output.values()
    )


def widened(
    copied: Callable[[nn.Module], nn.Module], model: nn.Module, tried: Sequence[Case]
) -> tuple[nn.Module, list[Case], list[dict[str, Any]]] | None:
    """The model, its cases and its outputs in float64; None if it does not run like that."""
    wide = copied(model).double()
    wide_cases = [widened_case(case) for case in tried]
    try:
        outputs = outputs_of(wide, wide_cases)
    except Exception:  # noqa: BLE001 - the model insists on its dtype
        return None
    return wide, wide_cases, outputs


def widened_case(case: Case) -> Case:
    """The same call with its real numbers in float64."""
    return Case(_widened(case.args), _widened(dict(case.kwargs)), case.method)


def rounding(
    model: nn.Module, tried: Sequence[Case], expected: Sequence[dict[str, Any]]
) -> Equivalence:
    """How far `model`'s outputs move when each input moves to a next number of its dtype."""
    moved = [Case(_nudged(c.args), _nudged(dict(c.kwargs)), c.method) for c in tried]
    return compare(expected, outputs_of(model, moved))


def within(check: Equivalence, noise: Equivalence) -> Equivalence:
    """`check`, in which what does not exceed 100 times the rounding `noise` passes.

    A model may amplify the last digits of its inputs to any size (a deep one whose weights are
    random, a chaotic one): there a fixed tolerance would refuse what is right.
    """
    moved = {output.name: output.max_abs for output in noise.outputs}

    def passes(output: OutputDifference) -> bool:
        by = moved.get(output.name)
        if output.max_abs is None or by is None:
            return output.passed
        return output.passed or output.max_abs <= _ROUNDINGS * by

    return Equivalence(
        tuple(replace(o, passed=True, problem=None) if passes(o) else o for o in check.outputs)
    )


def outputs_of(model: nn.Module, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """What `model` returns on each case, from the same random state; nothing is left changed."""
    return [run(model, case) for case in cases]


def compare(expected: Sequence[dict[str, Any]], actual: Sequence[dict[str, Any]]) -> Equivalence:
    """The differences over all cases; NaN and Inf must be where they were (masked scores)."""
    records: list[OutputDifference] = []
    for number, (a, b) in enumerate(zip(expected, actual, strict=True)):
        prefix = f"case {number + 1}: " if len(expected) > 1 else ""
        records += compare_outputs(a, b, prefix=prefix, finite_only=True)
    return Equivalence(tuple(records))


@dataclass(frozen=True)
class PairDifference:
    """How far a folded layer is from the layer and the batch norm."""

    max_rel: float
    problem: str | None  # None: within rounding


class PairProof:
    """Runs the original model, and compares each match where it runs: layer and norm, and folded.

    Where a layer runs, the folded layer runs beside it on the same input, and is compared with the
    layer's output after the batch norm. With `keep`, folded weights are computed once, and stay in
    `weights` to be used; otherwise one pair is in memory at a time.
    """

    def __init__(
        self, model: nn.Module, matches: Sequence[tuple[Rule, Match]], *, keep: bool
    ) -> None:
        self.model = model
        self.matches = matches
        self.keep = keep
        self.found: dict[str, PairDifference] = {}  # by the batch norm's path, the largest
        self.weights: dict[str, tuple[Tensor, Tensor]] = {}  # likewise

    def run(self, case: Case, *, if_finite: bool = False) -> dict[str, Any] | None:
        """What the model returns on `case`; with `if_finite` None, and nothing found, if it is not.

        Nothing is left changed.
        """
        found: dict[str, PairDifference] = {}
        args, kwargs = copy_tensors((case.args, dict(case.kwargs)))
        with restored(self.model):
            for rule, match in self.matches:
                if rule.rewrite is not None:
                    self._watch(rule.rewrite, match, found)  # `restored` takes the hooks off
            model = self.model
            called = model if case.method == "forward" else getattr(model, case.method)
            output = copied_leaves(called(*args, **kwargs))
        if if_finite and not is_finite(output):
            return None
        for path, difference in found.items():
            self.found[path] = _worse(self.found.get(path), difference)
        return output

    def _watch(self, rewrite: _Rewrite, match: Match, found: dict[str, PairDifference]) -> None:
        layer = self.model.get_submodule(match.first)
        norm = self.model.get_submodule(match.second)
        assert isinstance(norm, _BatchNorm)
        busy: list[bool] = []

        def after_layer(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            if busy:
                return
            busy.append(True)
            try:
                plain = plain_layer(layer)
                weights = self.weights.get(match.second)
                if weights is None:
                    weights = rewrite(plain, norm)
                    if self.keep:
                        self.weights[match.second] = weights
                fused = folded_layer(plain, *weights)(*args, **kwargs)
                judged = _judged(plain, norm, rewrite, args, kwargs, output, fused)
            finally:
                busy.clear()
            found[match.second] = _worse(found.get(match.second), judged)

        layer.register_forward_hook(after_layer, with_kwargs=True)


def _worse(a: PairDifference | None, b: PairDifference) -> PairDifference:
    if a is None or (not a.problem and (b.problem or b.max_rel > a.max_rel)):
        return b
    return a


def _judged(
    layer: nn.Module,
    norm: _BatchNorm,
    rewrite: _Rewrite,
    args: Any,
    kwargs: Any,
    output: Tensor,
    fused: Tensor,
) -> PairDifference:
    expected = _normed(layer, norm, output)

    def in_float64() -> tuple[Tensor, Tensor]:
        wide_layer, wide_norm = copy.deepcopy(layer).double(), copy.deepcopy(norm).double()
        wide_args, wide_kwargs = _widened(args), _widened(kwargs)
        exact = _normed(wide_layer, wide_norm, wide_layer(*wide_args, **wide_kwargs))
        folded = folded_layer(wide_layer, *rewrite(wide_layer, wide_norm))
        return exact, folded(*wide_args, **wide_kwargs)

    return decided(expected, fused, _ROUNDING.get(output.dtype, 0.0), in_float64)


def decided(
    expected: Tensor,
    fused: Tensor,
    within: float,
    in_float64: Callable[[], tuple[Tensor, Tensor]],
) -> PairDifference:
    """How far what a folded layer gives is from what was `expected`.

    Up to `within` (relative) it is rounding. Beyond that, rounding hides small errors, and
    `in_float64` repeats both: there a right fold agrees to the last digits, and the error of either
    side can be measured.
    """
    difference, peak = _apart(expected, fused), _peak(expected)
    max_rel = difference / peak if peak else difference
    if not math.isfinite(max_rel):
        return PairDifference(max_rel, "its output is NaN or Inf, so nothing can be shown.")
    if max_rel <= within:
        return PairDifference(max_rel, None)
    exact, wide = in_float64()
    peak = _peak(exact)
    if _apart(exact, wide) > 1e-9 * peak:
        return PairDifference(max_rel, f"the folded layer is off by {max_rel:.2g} (relative).")
    before, after = _apart(exact, expected), _apart(exact, fused)
    if after > _WORSE * before + _WORSE * torch.finfo(expected.dtype).eps * peak:
        return PairDifference(
            max_rel,
            f"in {expected.dtype} the folded layer is off by {after:.2g}, the original by "
            f"{before:.2g}.",
        )
    return PairDifference(max_rel, None)


def _normed(layer: nn.Module, norm: _BatchNorm, output: Tensor) -> Tensor:
    """The batch norm, by torch's own function, over the layer's channel axis."""
    assert isinstance(layer.weight, Tensor)
    axis = output.dim() - 1 - (layer.weight.dim() - 2)
    moved = output.movedim(axis, 1) if output.dim() > 1 else output[None]
    result = F.batch_norm(
        moved, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )
    return result.movedim(1, axis) if output.dim() > 1 else result[0]


def _apart(a: Tensor, b: Tensor) -> float:
    """max|a − b|."""
    return _peak(a.double() - b.double())


def _peak(a: Tensor) -> float:
    return unwrapped(a.double().abs()).max().item() if a.numel() else 0.0


def unwrapped(tensor: Tensor) -> Tensor:
    """`tensor` as values, where torch.vmap or torch.func put it into a tensor of its own kind.

    Those of all samples, that is: inside torch.vmap a tensor seems to be that of one of them.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_widened(entry) for entry in value)
    if isinstance(value, dict):
        return {key: _widened(entry) for key, entry in value.items()}
    return value


def _nudged(value: Any) -> Any:
    """Real numbers each replaced by the next larger or smaller one of their dtype."""
    generator = torch.Generator("cpu").manual_seed(0)

    def nudged(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            up = torch.rand(value.shape, generator=generator, device="cpu") < 0.5
            towards = torch.where(up.to(value.device), math.inf, -math.inf).to(value.dtype)
            # (an infinite one, as in a mask, stays)
            return torch.where(value.isfinite(), torch.nextafter(value, towards), value)
        if isinstance(value, (list, tuple)):
            return type(value)(map(nudged, value))
        if isinstance(value, dict):
            return {key: nudged(entry) for key, entry in value.items()}
        return value

    return nudged(value)
