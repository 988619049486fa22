"""What verbs are given: a model, and example inputs as a list of cases, one per call of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from torchfuse.errors import InputError

__all__ = [
    "Case",
    "cases",
    "check_finite",
    "check_model",
    "half_precision",
    "require_finite_tensors",
    "require_float32",
    "resized",
]

# Their weights and statistics are numbers to calculate with; Inf is no number that can be meant.
_WEIGHTED = (_ConvNd, nn.Linear, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# The real and complex dtypes that torch calculates in; float8 and the like only store.
_CALCULATED = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128),
)


@dataclass(frozen=True, eq=False)
class Case:
    """The arguments of one call, and the method that is called with them."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    method: str = "forward"

    def method_of(self, model: Any) -> Callable[..., Any]:
        """What is called: `model` itself, its hooks included, or its method of that name."""
        called: Callable[..., Any] = (
            model if self.method == "forward" else getattr(model, self.method)
        )
        return called

    def __str__(self) -> str:
        """The call in words, shapes instead of values: `forward(1×3×8×8, mask=1×8)`."""
        shown = [_described(arg) for arg in self.args]
        shown += [f"{name}={_described(value)}" for name, value in self.kwargs.items()]
        return f"{self.method}({', '.join(shown)})"


def cases(example_inputs: Any, name: str = "example_inputs") -> list[Case]:
    """The cases that `example_inputs` stands for, at least one; errors call it `name`.

    A tensor is the only positional argument, a tuple all positional arguments, a mapping with
    string keys all keyword arguments; a list is several such cases. A `Case` gives both kinds of
    arguments, or names another method than `forward`.
    """
    if isinstance(example_inputs, list):
        if not example_inputs:
            raise InputError(f"{name} is an empty list; give at least one case to run.")
        return [_case(entry, f"{name}[{i}]") for i, entry in enumerate(example_inputs)]
    return [_case(example_inputs, name)]


def check_model(model: Any) -> None:
    """Raises InputError if `model` is nothing that can be edited."""
    if not isinstance(model, nn.Module):
        hint = ""
        if type(model).__name__ == "ExportedProgram":
            hint = " Use torchfuse.fuse_exported for an ExportedProgram."
        raise InputError(f"Expected a torch.nn.Module, got {type(model).__name__}.{hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "A scripted or traced module cannot be edited; fuse the nn.Module it was made from."
        )


def require_finite_tensors(model: nn.Module) -> None:
    """Raises InputError if a parameter of `model` holds NaN, or a layer's weight NaN or Inf.

    A layer is a convolution, a linear layer or a norm, its statistics included. Elsewhere Inf may
    be meant (a mask of scores), and in a buffer NaN too (a value that is not set yet).
    """
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        is_layer = isinstance(module, _WEIGHTED) or "running_var" in module._buffers
        tensors = dict(module.named_parameters(recurse=False))
        if is_layer:
            tensors |= dict(module.named_buffers(recurse=False))
        for name, tensor in tensors.items():
            check_finite(prefix + name, tensor, infinite=is_layer)


def check_finite(name: str, tensor: torch.Tensor, *, infinite: bool) -> None:
    """Raises InputError if `tensor`, which is called `name`, holds NaN or, if `infinite`, Inf.

    Tensors without values (on the meta device) and those of other libraries' classes pass.
    """
    known = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    if not known or tensor.is_meta or tensor.dtype not in _CALCULATED:
        return
    values = tensor.detach()
    if bool(values.sum().isfinite()):  # one pass; whatever is not finite makes it so
        return
    has_nan, has_inf = values.isnan(), values.isinf()
    kinds = {"NaN": has_nan, "Inf": has_inf} if infinite else {"NaN": has_nan}
    found = {kind: count for kind, has in kinds.items() if (count := int(has.sum()))}
    if found:
        kind = " and ".join(found)
        raise InputError(
            f"Expected finite weights, but '{name}' has {kind} in {sum(found.values())} of its "
            f"{values.numel()} values; load a checkpoint without {' or '.join(found)}, or look for "
            "an overflow in training."
        )


def half_precision(model: Any, case: Case, error: Exception) -> InputError | None:
    """What to say of a call of `model` that ended in `error` because its weights are in half.

    None if that is not why: it may well run in half precision, on inputs in half precision.
    """
    if not isinstance(model, nn.Module):
        return None
    halves = (torch.float16, torch.bfloat16)
    tensors = (*model.named_parameters(), *model.named_buffers())
    found = next(((name, t.dtype) for name, t in tensors if t.dtype in halves), None)
    given = {leaf.dtype for leaf in tree_leaves((case.args, dict(case.kwargs))) if _is_real(leaf)}
    # torch names dtypes so where two do not fit, or where there is no kernel for one.
    blamed = any(word in str(error) for word in ("Half", "BFloat16", "dtype", "float16"))
    if found is None or not blamed:
        return None
    name, dtype = found
    other = f", or give inputs in {dtype}" if given - {dtype} else ""
    return InputError(
        f"Expected a model in float32, got {dtype} ('{name}'); call model.float() first{other}."
    )


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def require_float32(model: nn.Module) -> None:
    """Raises InputError if a parameter of `model` is a real number in another precision."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype is not torch.float32:
            raise InputError(
                f"Expected a model in float32, got {parameter.dtype} ('{name}'); call "
                "model.float() first."
            )


def resized(case: Case, *, batch: bool, spatial: bool) -> Case:
    """The case with one sample less (two for one), and images and sequences at half the size."""
    return Case(
        _resized(case.args, batch, spatial),
        _resized(dict(case.kwargs), batch, spatial),
        case.method,
    )


def _resized(value: Any, batch: bool, spatial: bool) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() >= 2 and value.numel():
        if batch:
            value = value[:-1] if value.shape[0] > 1 else torch.cat([value, value])
        if spatial and value.is_floating_point():
            for axis in range(2, value.dim()):
                value = value.narrow(axis, 0, max(1, value.shape[axis] // 2))
        return value
    if type(value) in (list, tuple):
        return type(value)(_resized(entry, batch, spatial) for entry in value)
    if type(value) is dict:
        return {key: _resized(entry, batch, spatial) for key, entry in value.items()}
    return value


def _case(entry: Any, where: str) -> Case:
    if isinstance(entry, Case):
        return entry
    if isinstance(entry, torch.Tensor):
        return Case((entry,))
    if isinstance(entry, tuple):
        return Case(entry)
    if isinstance(entry, Mapping):
        if wrong := [key for key in entry if not isinstance(key, str)]:
            raise InputError(
                f"{where} has the key {wrong[0]!r}; a dict stands for keyword arguments, so its "
                "keys must be strings. Wrap a dict that is one positional argument: `(value,)`."
            )
        return Case((), dict(entry))
    hint = " Turn a list into a tuple." if isinstance(entry, list) else ""
    raise InputError(
        f"{where} must be a tensor, a tuple of arguments, a dict of keyword arguments, or a list "
        f"of such cases; got {type(entry).__name__}.{hint}"
    )


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "×".join(map(str, value.shape)) or "scalar"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_described, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_described(v)}" for key, v in value.items()) + "}"
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else "…"
