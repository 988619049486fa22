"""The sequences of modules that can be fused by name, and how each becomes one module."""

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.ao.nn.intrinsic as nni
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from torchfuse.algebra.folding import fold_batch_norm
from torchfuse.errors import FusionError
from torchfuse.fusing.by_name.refusals import (
    check_channels,
    check_foldable,
    check_mode,
    check_rounding,
    check_trainable_norm,
)

__all__ = [
    "SUPPORTED_SEQUENCES",
    "FuserFunc",
    "Types",
    "UnsupportedSequenceError",
    "fuse_known_modules",
    "type_names",
]

Types = tuple[type[nn.Module], ...]


@dataclass(frozen=True)
class _Sequence:
    """How one sequence of module types is fused; `None`: not in that mode."""

    folds: bool  # a batch norm is folded into the weights before it
    eval_class: type[nn.Module] | None  # holds what is left after folding; None: the layer alone
    qat_class: type[nn.Module] | None  # holds all modules as they are, for prepare_qat


_SEQUENCES: dict[Types, _Sequence] = {
    (nn.Conv1d, nn.BatchNorm1d): _Sequence(True, None, nni.ConvBn1d),
    (nn.Conv2d, nn.BatchNorm2d): _Sequence(True, None, nni.ConvBn2d),
    (nn.Conv3d, nn.BatchNorm3d): _Sequence(True, None, nni.ConvBn3d),
    (nn.Conv1d, nn.BatchNorm1d, nn.ReLU): _Sequence(True, nni.ConvReLU1d, nni.ConvBnReLU1d),
    (nn.Conv2d, nn.BatchNorm2d, nn.ReLU): _Sequence(True, nni.ConvReLU2d, nni.ConvBnReLU2d),
    (nn.Conv3d, nn.BatchNorm3d, nn.ReLU): _Sequence(True, nni.ConvReLU3d, nni.ConvBnReLU3d),
    (nn.Conv1d, nn.ReLU): _Sequence(False, nni.ConvReLU1d, nni.ConvReLU1d),
    (nn.Conv2d, nn.ReLU): _Sequence(False, nni.ConvReLU2d, nni.ConvReLU2d),
    (nn.Conv3d, nn.ReLU): _Sequence(False, nni.ConvReLU3d, nni.ConvReLU3d),
    (nn.Linear, nn.BatchNorm1d): _Sequence(True, None, nni.LinearBn1d),
    (nn.Linear, nn.ReLU): _Sequence(False, nni.LinearReLU, nni.LinearReLU),
    (nn.BatchNorm2d, nn.ReLU): _Sequence(False, nni.BNReLU2d, nni.BNReLU2d),
    (nn.BatchNorm3d, nn.ReLU): _Sequence(False, nni.BNReLU3d, nni.BNReLU3d),
    (nn.ConvTranspose1d, nn.BatchNorm1d): _Sequence(True, None, None),
    (nn.ConvTranspose2d, nn.BatchNorm2d): _Sequence(True, None, None),
    (nn.ConvTranspose3d, nn.BatchNorm3d): _Sequence(True, None, None),
}

#: Every sequence of module types that can be fused by name.
SUPPORTED_SEQUENCES: tuple[Types, ...] = tuple(_SEQUENCES)

_IN_SHORT = "conv-bn, conv-bn-relu, conv-relu, linear-bn, linear-relu, bn-relu, conv_transpose-bn"

# torch.ao's contract for `fuser_func`: (modules, is_qat, additional mapping) → as many modules.
FuserFunc = Callable[[list[nn.Module], bool, Mapping[Types, Any] | None], Sequence[nn.Module]]


class UnsupportedSequenceError(FusionError):
    """No way to fuse these types is known; by default the list is left alone with a warning."""


def folds(types: Types) -> bool:
    """Return whether fusing `types` folds a batch norm into the layer before it."""
    return types in _SEQUENCES and _SEQUENCES[types].folds


def fuse_known_modules(
    mod_list: list[nn.Module],
    is_qat: bool,
    additional_fuser_method_mapping: Mapping[Types, Any] | None = None,
) -> list[nn.Module]:
    """Return the fused module followed by as many Identities as it replaces.

    Pre-forward hooks of the first module and forward hooks of the last one move to the result.
    """
    types: Types = tuple(type_before_parametrizations(module) for module in mod_list)
    custom = (additional_fuser_method_mapping or {}).get(types)
    if custom is not None:
        fused = cast("nn.Module", custom(is_qat, *mod_list))
    elif types in _SEQUENCES:
        fused = _fuse_sequence(_SEQUENCES[types], mod_list, is_qat)
    else:
        raise UnsupportedSequenceError(
            f"no way to fuse {type_names(types)} is known; supported sequences are {_IN_SHORT}"
        )
    fused.training = mod_list[0].training
    if hasattr(mod_list[0], "qconfig"):
        fused.qconfig = mod_list[0].qconfig
    _move_hooks(mod_list[0], fused, *_PRE_HOOKS)
    _move_hooks(mod_list[-1], fused, *_HOOKS)
    identities: list[nn.Module] = [nn.Identity() for _ in mod_list[1:]]
    for identity in identities:
        identity.training = mod_list[0].training
    return [fused, *identities]


def _fuse_sequence(sequence: _Sequence, modules: list[nn.Module], is_qat: bool) -> nn.Module:
    if not sequence.folds:
        assert sequence.eval_class is not None
        return sequence.eval_class(*modules)
    layer, norm, *rest = modules
    check_mode(modules, is_qat)
    check_channels(layer, norm)
    if is_qat:
        if sequence.qat_class is None:
            raise UnsupportedSequenceError(
                f"torch.ao has no quantization-aware class for {type_names(map(type, modules))}"
            )
        check_trainable_norm(norm)
        return sequence.qat_class(*modules)
    folded = _fold(layer, cast("nn.BatchNorm2d", norm))
    return folded if sequence.eval_class is None else sequence.eval_class(folded, *rest)


def _fold(layer: nn.Module, norm: nn.BatchNorm2d) -> nn.Module:
    """Return a copy of `layer`, without its hooks on calls, that includes `norm`."""
    check_foldable(layer, norm)
    weight, bias = fold_batch_norm(layer, norm)
    exact = fold_batch_norm(_in_float64(layer), norm)[0] if _is_narrow(weight) else None
    check_rounding(layer, weight, bias, exact)
    had = cast("nn.Parameter", layer.weight if layer.bias is None else layer.bias)
    folded = _shallow_copy(layer)
    folded.weight = nn.Parameter(weight, cast("nn.Parameter", layer.weight).requires_grad)
    folded.bias = nn.Parameter(bias, had.requires_grad)
    for name, value in vars(folded).items():
        if re.match(r"_(forward|backward)(_pre)?_hooks", name) and isinstance(value, dict):
            setattr(folded, name, OrderedDict())
    return folded


def _is_narrow(weight: torch.Tensor) -> bool:
    return weight.dtype in (torch.float16, torch.bfloat16)


def _in_float64(layer: nn.Module) -> nn.Module:
    wide = _shallow_copy(layer)
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(wide, name, nn.Parameter(parameter.detach().double(), requires_grad=False))
    return wide


def _shallow_copy(layer: nn.Module) -> nn.Module:
    """Return a module whose parameters can be replaced; it copies no weight."""
    copied = copy.copy(layer)
    copied.__dict__ = {**vars(layer), "_parameters": dict(layer._parameters)}
    return copied


def _move_hooks(source: nn.Module, target: nn.Module, *names: str) -> None:
    """Move the hooks of a call, and not their copies: a handle's `remove()` looks into its dict."""
    if source is target:  # a fuser of the user's own may change the module that it is given
        return
    for name in names:
        moved, present = getattr(source, name), getattr(target, name)
        if present:
            present.update(moved)
        else:
            setattr(target, name, moved)
        setattr(source, name, OrderedDict())


_PRE_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def type_names(types: Iterable[type[nn.Module]]) -> str:
    """Return the types as a sequence: `Conv2d → BatchNorm2d`."""
    return " → ".join(kind.__name__ for kind in types)
