"""Drop-ins for torch.ao.quantization's `fuse_modules` and `fuse_modules_qat`: fusion by name.

Same signatures and results: the first module of a list becomes the fused one, of the class that
torch.ao's `prepare` and `convert` know, the others become `nn.Identity`. Where torch is wrong or
mute, these are not: see the docstring of `fuse_modules`.
"""

import difflib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from torchfuse.cases import require_finite_tensors
from torchfuse.errors import FusionError, FusionWarning, InputError, UnsupportedError
from torchfuse.fusing.by_name.refusals import hooks_without_a_place, listed, refuse_sharing
from torchfuse.fusing.by_name.sequences import (
    SUPPORTED_SEQUENCES,
    FuserFunc,
    Types,
    UnsupportedSequenceError,
    folds,
    fuse_known_modules,
)
from torchfuse.isolation.model_copy import copied

__all__ = ["SUPPORTED_SEQUENCES", "fuse_known_modules", "fuse_modules", "fuse_modules_qat"]

Model = TypeVar("Model", bound=nn.Module)


def fuse_modules(
    model: Model,
    modules_to_fuse: Sequence[str] | Sequence[Sequence[str]],
    inplace: bool = False,
    fuser_func: FuserFunc = fuse_known_modules,
    fuse_custom_config_dict: Mapping[str, Any] | None = None,
    *,
    strict: bool = False,
    example_inputs: Any = None,
) -> Model:
    """Return `model` with each named sequence fused, as torch.ao.quantization.fuse_modules does.

    Args:
        model: the model; batch norms that are folded must be in eval mode.
        modules_to_fuse: one list of dotted module names, or a list of such lists.
        inplace: change `model` itself instead of a deep copy. If anything is refused, nothing
            has been changed.
        fuser_func: replaces `fuse_known_modules`; takes (modules, is_qat, mapping) and returns
            as many modules.
        fuse_custom_config_dict: `{"additional_fuser_method_mapping": {types: method}}`, where
            method takes (is_qat, *modules) and returns the fused module.
        strict: raise where a sequence is not supported, or where a hook would be lost, instead
            of warning.
        example_inputs: a tensor, a tuple of tensors, a dict of keyword tensors, or a list of
            such cases. With them, the model is run and recorded first: every list must run
            once, in the listed order, each output read by the next module only, where a batch
            norm is folded on other paths through the code and in other methods too (as `fuse`
            asks it); and the fused model's outputs are compared with the original's.

    Raises:
        InputError: `modules_to_fuse` is no list of names, a name is not in the model, or, with
            `example_inputs`, a weight is NaN or Inf.
        FusionError: fusing would change what the model computes, or (with `strict`) a sequence
            is not supported.

    Differences from torch, each deliberate: an unsupported sequence is left unchanged with a
    FusionWarning (torch documents that and raises); grouped transposed convs and batch norms
    without γ and β are folded right; what cannot be folded exactly is refused with the reason;
    a hook that has nothing left to look at is named in a warning; hooks that move along fire
    once and keep their handles; the fused module has the training flag and the `qconfig` of the
    first.
    """
    return _fuse(
        model,
        modules_to_fuse,
        is_qat=False,
        inplace=inplace,
        fuser_func=fuser_func,
        custom=fuse_custom_config_dict,
        strict=strict,
        example_inputs=example_inputs,
    )


def fuse_modules_qat(
    model: Model,
    modules_to_fuse: Sequence[str] | Sequence[Sequence[str]],
    inplace: bool = False,
    fuser_func: FuserFunc = fuse_known_modules,
    fuse_custom_config_dict: Mapping[str, Any] | None = None,
    *,
    strict: bool = False,
    example_inputs: Any = None,
) -> Model:
    """Return `model` fused for quantization-aware training: batch norms are kept, and wrapped.

    Takes what `fuse_modules` takes. The fused classes (`ConvBnReLU2d` …) are those that
    `prepare_qat` replaces by its own.
    """
    return _fuse(
        model,
        modules_to_fuse,
        is_qat=True,
        inplace=inplace,
        fuser_func=fuser_func,
        custom=fuse_custom_config_dict,
        strict=strict,
        example_inputs=example_inputs,
    )


def _fuse(
    model: Model,
    modules_to_fuse: Sequence[str] | Sequence[Sequence[str]],
    *,
    is_qat: bool,
    inplace: bool,
    fuser_func: FuserFunc,
    custom: Mapping[str, Any] | None,
    strict: bool,
    example_inputs: Any,
) -> Model:
    lists = _as_lists(modules_to_fuse)
    for names in lists:
        for name in names:
            _find(model, name)
    fuser = _Fuser(
        is_qat=is_qat,
        function=fuser_func,
        mapping=(custom or {}).get("additional_fuser_method_mapping", {}),
        strict=strict,
    )
    if example_inputs is not None:
        from torchfuse.fusing.by_name.recorded import check_fused_output, check_order

        require_finite_tensors(model)
        folded = [names for names in lists if fuser.folds([_find(model, name) for name in names])]
        check_order(model, lists, example_inputs, folded=[] if is_qat else folded)
        trial = fuser.apply(_copied(model), lists)
        check_fused_output(model, trial, example_inputs)
        if not inplace:
            return trial
        fuser = fuser.silent()
    return fuser.apply(model if inplace else _copied(model), lists)


def _copied(model: Model) -> Model:
    try:
        return copied(model)
    except UnsupportedError as error:
        raise FusionError(f"{error} Or pass inplace=True to change the model itself.") from error


@dataclass
class _Fuser:
    """Fuses lists one after another; takes back what it did when one is refused."""

    is_qat: bool
    function: FuserFunc
    mapping: Mapping[Types, Any]
    strict: bool
    warns: bool = True
    undo: list[Callable[[], None]] = field(default_factory=list)

    def silent(self) -> "_Fuser":
        return _Fuser(self.is_qat, self.function, self.mapping, self.strict, warns=False)

    def apply(self, model: Model, lists: list[list[str]]) -> Model:
        try:
            for names in lists:
                self.fuse_list(model, names)
        except BaseException:
            for undo in reversed(self.undo):
                undo()
            raise
        finally:
            self.undo.clear()
        return model

    def fuse_list(self, model: nn.Module, names: list[str]) -> None:
        modules = [_find(model, name) for name in names]
        what = listed(names, modules)
        self._remember(modules)
        folding = self.folds(modules)
        lost = hooks_without_a_place(names, modules) if folding and not self.is_qat else []
        if lost and self.strict:
            raise FusionError(f"cannot fuse {what}: {' and '.join(lost)} would be lost")
        try:
            if folding:
                refuse_sharing(model, names, modules)
            fused = self.function(modules, self.is_qat, self.mapping)
        except UnsupportedSequenceError as error:
            if self.strict:
                raise FusionError(f"cannot fuse {what}: {error}") from None
            self._warn(f"left {what} unchanged: {error}")
            return
        except FusionError as error:
            raise FusionError(f"cannot fuse {what}: {error}") from None
        if len(fused) != len(names):
            raise FusionError(
                f"cannot fuse {what}: fuser_func must return as many modules as it is given, "
                f"{len(names)}, and returned {len(fused)}"
            )
        if lost:
            self._warn(f"fused {what} and dropped {' and '.join(lost)}: nothing left to look at")
        for name, module in zip(names, fused, strict=True):
            self._replace(model, name, module)

    def folds(self, modules: list[nn.Module]) -> bool:
        """Whether the fuser folds a batch norm into the first of the modules."""
        types = tuple(type_before_parametrizations(module) for module in modules)
        return self.function is fuse_known_modules and types not in self.mapping and folds(types)

    def _remember(self, modules: list[nn.Module]) -> None:
        for module in modules:
            # Moving hooks gives a module new dicts; torch.ao's own fuser empties them instead.
            hooks = {
                name: (value, list(value.items()))
                for name, value in vars(module).items()
                if "_hooks" in name and isinstance(value, dict)
            }

            def restore(module: nn.Module = module, hooks: dict[str, Any] = hooks) -> None:
                for name, (value, items) in hooks.items():
                    value.clear()
                    value.update(items)
                    setattr(module, name, value)

            self.undo.append(restore)

    def _replace(self, model: nn.Module, name: str, module: nn.Module) -> None:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        before = getattr(parent, child)
        setattr(parent, child, module)
        self.undo.append(lambda: setattr(parent, child, before))

    def _warn(self, message: str) -> None:
        if self.warns:
            warnings.warn(message, FusionWarning, stacklevel=6)


def _as_lists(modules_to_fuse: Any) -> list[list[str]]:
    wanted = "modules_to_fuse must be a list of module names or a list of such lists"
    if isinstance(modules_to_fuse, str) or not isinstance(modules_to_fuse, Iterable):
        raise InputError(f"{wanted}, for example ['conv', 'bn'], not {modules_to_fuse!r}")
    items = list(modules_to_fuse)
    if items and all(isinstance(item, str) for item in items):
        return [items]
    for item in items:
        if not isinstance(item, list | tuple) or not all(isinstance(name, str) for name in item):
            raise InputError(f"{wanted}; one of them is {item!r}")
        if not item:
            raise InputError(f"{wanted}; one of them is empty")
    return [list(item) for item in items]


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        if name:
            return model.get_submodule(name)
    except AttributeError:
        pass
    names = [known for known, _ in model.named_modules(remove_duplicate=False) if known]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"; near matches: {', '.join(near)}" if near else f"; it has {', '.join(names[:8])}"
    raise InputError(f"{type(model).__name__} has no module {name!r}{hint if names else ''}")
