"""Compares what two models compute: verify."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchfuse.cases import Case, cases, half_precision, require_finite_tensors
from torchfuse.errors import InputError
from torchfuse.isolation.snapshot import restored
from torchfuse.units import decibels, sqnr_db
from torchfuse.verifying.equivalence import Equivalence, OutputDifference
from torchfuse.verifying.named_leaves import named_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torchfuse.isolation.snapshot import Snapshot

__all__ = [
    "Equivalence",
    "OutputDifference",
    "compare_outputs",
    "copied_leaves",
    "is_finite",
    "tolerance",
    "verify",
]

# What rounding alone may do to max|a − b| / max|a|, over a whole model.
_RELATIVE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
    torch.complex128: 1e-9,
    torch.complex64: 1e-4,
}


def tolerance(dtype: torch.dtype) -> float:
    """Largest max|a − b| / max|a| that rounding in `dtype` explains; 0 for whole numbers."""
    return _RELATIVE.get(dtype, 0.0)


def verify(
    reference: Callable[..., Any],
    candidate: Callable[..., Any],
    example_inputs: Any,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    min_sqnr_db: float | None = None,
) -> Equivalence:
    """The difference of every output of `candidate` from `reference`'s, over all cases.

    Both are called with copies of the same inputs and from the same random state, and are left
    as they were. An output passes if max|a − b| ≤ atol + rtol · max|a| and, where asked for, its
    signal-to-noise ratio is at least `min_sqnr_db`. Without `rtol` and `atol` the tolerance is
    what rounding in the output's dtype explains; with only `min_sqnr_db` it alone decides. NaN,
    Inf, and another structure, shape or dtype never pass.

    Raises:
        InputError: a tolerance, a model or inputs that make no sense; a reference whose outputs
            are NaN or Inf because its weights are.
    """
    for name, bound in (("rtol", rtol), ("atol", atol), ("min_sqnr_db", min_sqnr_db)):
        if bound is not None and (math.isnan(bound) or (bound < 0 and name != "min_sqnr_db")):
            raise InputError(f"{name} must be a number of at least 0; got {bound}.")
    for name, model in (("reference", reference), ("candidate", candidate)):
        if not callable(model):
            raise InputError(
                f"Expected a model or another callable as {name}, got {type(model).__name__}; for "
                "a file give torchfuse.load(path), for the result of fuse() its .model."
            )
    listed = cases(example_inputs)
    outputs: list[OutputDifference] = []
    for index, case in enumerate(listed):
        expected = _run_or_say_why_not(reference, case)
        if isinstance(reference, nn.Module) and not is_finite(expected):
            require_finite_tensors(reference)
        actual = _run_or_say_why_not(candidate, case)
        prefix = f"case {index + 1}: " if len(listed) > 1 else ""
        outputs += compare_outputs(
            expected, actual, rtol=rtol, atol=atol, min_sqnr_db=min_sqnr_db, prefix=prefix
        )
    alone = rtol is None and atol is None
    return Equivalence(tuple(outputs), min_sqnr_db if alone else None)


def _run_or_say_why_not(model: Callable[..., Any], case: Case) -> dict[str, Any]:
    try:
        return run(model, case)
    except Exception as error:
        if (half := half_precision(model, case, error)) is not None:
            raise half from error
        raise


def run(model: Callable[..., Any], case: Case, snapshot: Snapshot | None = None) -> dict[str, Any]:
    """What `model` returns for a copy of `case`'s inputs, leaf by name; nothing is left changed.

    `snapshot` is one of `model` as it is, for those who run it several times.
    """
    args, kwargs = copy_tensors((case.args, dict(case.kwargs)))
    with restored(model, snapshot=snapshot):
        # Copied before anything is put back: an output may be a view of what the model keeps.
        return copied_leaves(case.method_of(model)(*args, **kwargs))


def copied_leaves(output: Any) -> dict[str, Any]:
    """The tensors (copies of them) and numbers in a model's output, by name."""
    return {
        name: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
        for name, leaf in named_leaves(output)
    }


def is_finite(output: dict[str, Any]) -> bool:
    """Whether all tensors in an output are."""
    return all(
        bool(torch.isfinite(leaf).all())
        for leaf in output.values()
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_quantized
    )


def copy_tensors(value: Any) -> Any:
    """`value` with every tensor in it replaced by a copy; other objects are deep copies."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(copy_tensors(entry) for entry in value)
    if type(value) is dict:
        return {key: copy_tensors(entry) for key, entry in value.items()}
    # Storages are cloned there; a mode that undoes writes would take that for one, and undo it.
    with torch.utils._python_dispatch._disable_current_modes():
        return copy.deepcopy(value)


def compare_outputs(
    expected: Mapping[str, Any],
    actual: Mapping[str, Any],
    *,
    rtol: float | None = None,
    atol: float | None = None,
    min_sqnr_db: float | None = None,
    prefix: str = "",
    finite_only: bool = False,
) -> list[OutputDifference]:
    """One record per leaf of the two outputs, as `run` gives them, matched by name.

    With `finite_only`, NaN and Inf pass where both have the same one, and the rest is compared.
    """
    records = [
        _unequal(prefix + name, "only the candidate returns it.")
        for name in actual
        if name not in expected
    ]
    for name, leaf in expected.items():
        if name not in actual:
            records.append(_unequal(prefix + name, "the candidate does not return it."))
        else:
            other = actual[name]
            if finite_only:
                leaf, other = _without_equal_nonfinite(leaf, other)
            records.append(_compared(prefix + name, leaf, other, rtol, atol, min_sqnr_db))
    return records


def _without_equal_nonfinite(a: Any, b: Any) -> tuple[Any, Any]:
    """Both with zeros where both have the same NaN or Inf; as they are if one has another."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a, b
    if a.shape != b.shape or a.dtype != b.dtype or not a.is_floating_point():
        return a, b
    odd = ~torch.isfinite(a)
    if not torch.equal(odd, ~torch.isfinite(b)):
        return a, b
    if not torch.equal(a[odd].nan_to_num(nan=0.0), b[odd].nan_to_num(nan=0.0)):
        return a, b
    return a.masked_fill(odd, 0), b.masked_fill(odd, 0)


def _compared(
    name: str,
    expected: Any,
    actual: Any,
    rtol: float | None,
    atol: float | None,
    min_sqnr_db: float | None,
) -> OutputDifference:
    a, b = _as_tensor(expected), _as_tensor(actual)
    if a is None or b is None:
        if type(expected) is type(actual) and (expected is actual or expected == actual):
            return OutputDifference(name, 0.0, 0.0, math.inf, passed=True)
        return _unequal(
            name, f"{_short(expected)} became {_short(actual)}; only equal values pass."
        )
    if a.shape != b.shape:
        return _unequal(name, f"the shape {list(a.shape)} became {list(b.shape)}.")
    if a.dtype != b.dtype:
        return _unequal(name, f"the dtype {a.dtype} became {b.dtype}.")
    for side, tensor in (("reference", a), ("candidate", b)):
        if not bool(torch.isfinite(tensor).all()):
            return _unequal(name, f"the {side} has NaN or Inf, which cannot be compared.")
    return _difference(name, a, b, rtol, atol, min_sqnr_db)


def _difference(
    name: str,
    a: Tensor,
    b: Tensor,
    rtol: float | None,
    atol: float | None,
    min_sqnr_db: float | None,
) -> OutputDifference:
    dtype = a.dtype
    wide = torch.complex128 if dtype.is_complex else torch.float64
    a, b = a.to("cpu", wide), b.to("cpu", wide)
    if a.numel() == 0:
        return OutputDifference(name, 0.0, 0.0, math.inf, passed=True)
    error = (a - b).abs()
    max_abs = error.max().item()
    peak = a.abs().max().item()
    noise, signal = error.square().sum().item(), a.abs().square().sum().item()
    max_rel = 0.0 if max_abs == 0 else max_abs / peak if peak else math.inf
    ratio_db = sqnr_db(signal, noise)
    problem = None
    if rtol is not None or atol is not None or min_sqnr_db is None:
        default = tolerance(dtype) if rtol is None and atol is None else 0.0
        allowed = (atol or 0.0) + (default if rtol is None else rtol) * peak
        if max_abs > allowed:
            problem = f"differs by up to {max_abs:.3g}; at most {allowed:.3g} was expected."
    if problem is None and min_sqnr_db is not None and ratio_db < min_sqnr_db:
        least = decibels(min_sqnr_db)
        problem = f"has an SQNR of {decibels(ratio_db)}; at least {least} was asked for."
    return OutputDifference(name, max_abs, max_rel, ratio_db, problem is None, problem)


def _as_tensor(leaf: Any) -> Tensor | None:
    if isinstance(leaf, Tensor):
        plain = leaf.detach()
        if plain.is_quantized:
            plain = plain.dequantize()
        return plain.to_dense() if plain.layout is not torch.strided else plain
    if isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool):
        return torch.tensor(
            leaf, dtype=torch.float64 if isinstance(leaf, float) else None, device="cpu"
        )
    if type(leaf).__module__ == "numpy" and hasattr(leaf, "shape"):
        try:
            return torch.as_tensor(leaf)
        except TypeError:  # strings and objects
            return None
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _unequal(name: str, problem: str) -> OutputDifference:
    return OutputDifference(name, None, None, None, passed=False, problem=problem)
