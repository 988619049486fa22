"""What makes a fusion by name wrong, found before anything is changed; each with its reason."""

from collections import Counter
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from torchfuse.errors import FusionError


def check_mode(modules: list[nn.Module], is_qat: bool) -> None:
    """Refuse modules in different modes, and folding a batch norm that is in training mode."""
    modes = {module.training for module in modules}
    if len(modes) > 1:
        raise FusionError(
            "the modules must all be in training mode or all in eval mode, and they are not: "
            "call model.train() or model.eval() first"
        )
    if modes == {True} and not is_qat:
        raise FusionError(
            "a batch norm in training mode normalises with the statistics of each batch, which "
            "no weights can express: call model.eval() first, or use fuse_modules_qat"
        )


def check_channels(layer: nn.Module, norm: nn.Module) -> None:
    """Refuse a batch norm that is not as wide as the layer before it."""
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if channels != norm.num_features:
        raise FusionError(
            f"the layer has {channels} output channels and the batch norm {norm.num_features}: "
            "they cannot follow one another"
        )


def check_trainable_norm(norm: nn.Module) -> None:
    """Refuse what torch.ao's quantization-aware classes cannot hold."""
    for attribute in ("affine", "track_running_stats"):
        if not getattr(norm, attribute):
            raise FusionError(
                f"torch.ao's quantization-aware classes need a batch norm with {attribute}=True, "
                f"and this one has {attribute}=False"
            )


def check_foldable(layer: nn.Module, norm: nn.BatchNorm2d) -> None:
    """Refuse what the algebra of folding does not cover."""
    if norm.running_mean is None or norm.running_var is None:
        raise FusionError(
            "the batch norm has no running statistics (track_running_stats=False), so it "
            "normalises with those of each batch, which no weights can express"
        )
    for module in (layer, norm):
        if is_parametrized(module):
            raise FusionError(
                f"{type_before_parametrizations(module).__name__} is parametrized: bake it in "
                "first with torch.nn.utils.parametrize.remove_parametrizations"
            )
        for name in ("weight", "bias"):
            if name not in module._parameters:
                raise FusionError(
                    f"the {name} of the {type(module).__name__} is no parameter of its own but "
                    "computed before each call, as by weight_norm: remove that first "
                    "(torch.nn.utils.remove_weight_norm, remove_spectral_norm, prune.remove)"
                )
    weight = cast("torch.Tensor", layer.weight)
    if weight.device != norm.running_mean.device:
        raise FusionError(
            f"the {type(layer).__name__} is on {weight.device} and the batch norm on "
            f"{norm.running_mean.device}: move them to one device first"
        )
    if weight.is_meta:
        raise FusionError("on the meta device there are no values to fold: load the weights first")
    narrow = weight.dtype in (torch.float16, torch.bfloat16)
    if weight.dtype != norm.running_mean.dtype and not (
        narrow and norm.running_mean.dtype == torch.float32
    ):
        raise FusionError(
            f"the {type(layer).__name__} is {weight.dtype} and the batch norm "
            f"{norm.running_mean.dtype}: convert one of them first"
        )


def check_rounding(layer: nn.Module, weight: Tensor, bias: Tensor, exact: Tensor | None) -> None:
    """Refuse a folded weight that its dtype cannot hold: it overflows, or is lost in underflow.

    `exact` is the folded weight in float64; None where its dtype has range to spare.
    """
    kind = f"the folded {type(layer).__name__}"
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise FusionError(
            f"{kind} would not be finite in {weight.dtype}: the batch norm's statistics are not, "
            "or its scale is too large; look at them, or convert both to float32 first"
        )
    if exact is None:
        return
    largest = exact.abs().amax(tuple(range(1, exact.dim())), keepdim=True)
    if ((weight.double() - exact).abs() > torch.finfo(weight.dtype).eps * largest).any():
        raise FusionError(
            f"{kind} would lose more than rounding in {weight.dtype}, whose smallest numbers are "
            "too large for it; convert both to float32 first"
        )


def refuse_sharing(model: nn.Module, names: list[str], modules: list[nn.Module]) -> None:
    """Refuse where a weight or statistic that folding changes the meaning of is used elsewhere."""
    everywhere = list(model.named_modules(remove_duplicate=False))
    folded = {id(module): name for name, module in zip(names[:2], modules[:2], strict=True)}
    for other_name, other in everywhere:
        name = folded.get(id(other))
        if name is not None and other_name != name:
            raise FusionError(
                f"{name} is also used as {other_name}, which would no "
                f"longer be the same module; give it a module of its own"
            )
    storages = {
        tensor.untyped_storage()._cdata: f"{name}.{tensor_name}"
        for name, module in zip(names[:2], modules[:2], strict=True)
        for tensor_name, tensor in module.named_parameters()
        if tensor.numel()
    }
    for other_name, other in everywhere:
        if id(other) in folded:
            continue
        for tensor_name, tensor in other.named_parameters(recurse=False):
            owner = storages.get(tensor.untyped_storage()._cdata) if tensor.numel() else None
            own = any(other_name.startswith(f"{name}.") for name in names[:2])  # parametrizations
            if owner is not None and not own:
                raise FusionError(
                    f"{owner} is tied to {other_name}.{tensor_name}, and "
                    "folding would untie them; clone one of them first if that is what you want"
                )


def hooks_without_a_place(names: list[str], modules: list[nn.Module]) -> list[str]:
    """Return the hooks that look at a value which no longer exists after folding."""
    lost = []
    for position, (name, module) in enumerate(zip(names, modules, strict=True)):
        kinds = Counter(
            forward=len(module._forward_hooks) if position < len(names) - 1 else 0,
            pre=len(module._forward_pre_hooks) if position > 0 else 0,
            backward=len(module._backward_hooks) + len(module._backward_pre_hooks),
        )
        words = {"forward": "forward hook", "pre": "forward pre-hook", "backward": "backward hook"}
        lost += [f"the {words[kind]} of {name}" for kind, count in kinds.items() if count]
    return lost


def listed(names: Iterable[str], modules: Iterable[nn.Module]) -> str:
    """Return the modules as a user knows them: `conv (Conv2d), bn (BatchNorm2d)`."""
    pairs = zip(names, modules, strict=True)
    return ", ".join(f"{name} ({type(module).__name__})" for name, module in pairs)
