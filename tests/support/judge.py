"""What must hold after `torchfuse.fuse`, whatever the network: the judge of the random tests."""

import contextlib
import copy

import torch
from torch import Tensor, nn

import torchfuse
from support.networks import Network

RELATIVE = {torch.float32: 1e-4, torch.float64: 1e-8}  # a fold rounds each weight once
RELATIVE_ROUGH = 5e-2  # bfloat16 keeps 8 bits


def problems(network: Network) -> list[str]:
    """Return what is wrong with the fused network, one line each; an empty list if nothing is.

    In float32 the fused model must compute what rounding allows. In float64, where nothing hides
    in rounding, it must be right by the conditions alone: the proof is there to find their defects.
    """
    model = network.model
    before = copy.deepcopy(model)
    result = torchfuse.fuse(model, network.inputs(0))
    found = [f"the original changed: {line}" for line in _changes(before, model)]
    planned = torchfuse.plan(model, network.inputs(0))
    planned.to_json()
    found += [f"planning changed the model: {line}" for line in _changes(before, model)]
    restored = torchfuse.unfuse(copy.deepcopy(result.model))
    found += [f"unfuse did not restore: {line}" for line in _changes(before, restored)]
    found += _different_outputs(network, before, result.model)
    wide = network.in_float64()
    unproved = torchfuse.fuse(wide.model, wide.inputs(0), verify=False)
    missing = {f.modules for f in planned.fusions} - {f.modules for f in unproved.plan.fusions}
    found += [f"not fused in float64: {modules}" for modules in sorted(missing)]
    before = copy.deepcopy(wide.model)
    found += [f"unproved, {line}" for line in _different_outputs(wide, before, unproved.model)]
    return found


def _different_outputs(network: Network, reference: nn.Module, fused: nn.Module) -> list[str]:
    found = []
    calls = [("forward", seed, batch, None) for seed, batch in ((1, 2), (2, 2), (3, 3), (4, 1))]
    calls += [("forward", seed, 2, shape) for seed, shape in enumerate(network.shapes(), 5)]
    calls += [(method, seed, 2, None) for method in network.methods for seed in (1, 2)]
    for method, seed, batch, shape in calls:
        inputs = network.inputs(seed, batch, shape)
        case = f"{method}, seed {seed}, shape {tuple(inputs.shape)}"
        try:
            expected = _run(reference, method, inputs)
        except (RuntimeError, ValueError, IndexError):  # it does not take this size
            with contextlib.suppress(Exception):
                _run(fused, method, inputs)  # what it changed until then, both must have changed
            continue
        try:
            got = _run(fused, method, inputs)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is a finding
            found.append(f"{case}: the fused model raises {type(error).__name__}: {error}")
            continue
        if expected.keys() != got.keys():
            found.append(f"{case}: {sorted(got)} instead of {sorted(expected)}")
            continue
        for name, value in expected.items():
            difference = _relative(value, got[name])
            if difference > _tolerance(network, reference, method, inputs, name, difference):
                found.append(f"{case}: {name} differs by {difference:.2g}")
    return found


def _run(model: nn.Module, method: str, inputs: Tensor) -> dict[str, Tensor]:
    """Return the outputs, and what hooks and attributes keep of this pass, by name."""
    for module in model.modules():  # what an earlier pass left, of inputs that only one model took
        vars(module).pop("seen", None)
    vars(model).pop("kept", None)
    call = model if method == "forward" else getattr(model, method)
    with torch.no_grad():
        output = call(inputs.clone())
    outputs = output if isinstance(output, tuple) else (output,)
    values = {f"output {index}": value for index, value in enumerate(outputs)}
    for name, module in model.named_modules():
        if hasattr(module, "seen"):
            values[f"{name}.seen"] = module.seen
    if hasattr(model, "kept"):
        values["kept"] = model.kept
    return {name: value.detach().clone() for name, value in values.items()}


def _relative(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return ((a - b).abs().max() / a.abs().max().clamp(min=1e-2)).item()


def _tolerance(
    network: Network, model: nn.Module, method: str, inputs: Tensor, name: str, difference: float
) -> float:
    """Return what is allowed in the network's dtype; where float32 exceeds it, what rounding does.

    That is a multiple of how far the original is from itself in float64, and of how far an input
    that is rounded otherwise moves its output: a norm over three values amplifies it, and so does
    bfloat16. In float64 there is no such allowance.
    """
    usual = RELATIVE_ROUGH if network.rough else RELATIVE[network.dtype]
    if difference <= usual or network.dtype is torch.float64:
        return usual
    rounded = _run(copy.deepcopy(model), method, inputs)[name]
    noises = []
    size = 2e-3 if network.rough else 2e-7  # half a unit in the last place, or a few
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        nearby = inputs * (1 + size * torch.randn(inputs.shape, generator=generator))
        moved = _run(copy.deepcopy(model), method, nearby)
        noises.append(_relative(rounded, moved[name]) if name in moved else float("inf"))
    wide = network.in_float64()
    exact = _run(wide.model, method, inputs.double())
    if name not in exact:  # a branch taken by the last digit
        return float("inf")
    noises.append(_relative(exact[name], rounded.double()))
    return max(usual, (1 if network.rough else 10) * max(noises))


def _changes(before: nn.Module, after: nn.Module) -> list[str]:
    """Return how `after` is not, bit for bit, what `before` is."""
    found = []
    old, new = dict(before.named_modules()), dict(after.named_modules())
    if list(old) != list(new):
        found.append(f"modules {sorted({*old} ^ {*new})}")
    for name in old.keys() & new.keys():
        if type(old[name]) is not type(new[name]):
            found.append(f"{name} is {type(new[name]).__name__}, was {type(old[name]).__name__}")
        if old[name].training != new[name].training:
            found.append(f"{name}.training is {new[name].training}")
        if len(old[name]._forward_hooks) != len(new[name]._forward_hooks):
            found.append(f"{name} has {len(new[name]._forward_hooks)} forward hooks")
        if hasattr(old[name], "seen") != hasattr(new[name], "seen"):
            found.append(f"{name}.seen")
    if hasattr(before, "kept") != hasattr(after, "kept"):
        found.append("kept")
    old_state, new_state = before.state_dict(), after.state_dict()
    if list(old_state) != list(new_state):
        found.append(f"state_dict keys {sorted({*old_state} ^ {*new_state})}")
    found += [
        f"state_dict()[{key!r}]"
        for key in old_state.keys() & new_state.keys()
        if not _identical(old_state[key], new_state[key])
    ]
    grads = {n: p.requires_grad for n, p in before.named_parameters(remove_duplicate=False)}
    if grads != {n: p.requires_grad for n, p in after.named_parameters(remove_duplicate=False)}:
        found.append("requires_grad, or which parameters are shared")
    return found


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
