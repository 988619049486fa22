"""Hooks see and change what they saw and changed."""

import pytest
import torch
from torch import Tensor, nn

import torchfuse
from support.fusing_checks import (
    IMAGE,
    ConvBn,
    assert_fuses,
    assert_skipped,
    check,
    like,
    trained,
)


def test_a_hook_that_changes_the_conv_output_is_respected() -> None:
    model = trained(ConvBn(), IMAGE)
    model.conv.register_forward_hook(lambda module, args, output: output * 2)
    assert_skipped(model, IMAGE, because="hook|comes from mul")


def test_a_hook_that_sees_the_conv_output_still_sees_it() -> None:
    model = trained(ConvBn(), IMAGE)
    seen: list[float] = []
    model.conv.register_forward_hook(lambda module, args, output: seen.append(output.sum().item()))
    assert_skipped(model, IMAGE, because="hook")
    seen.clear()
    fused = torchfuse.fuse(model, IMAGE).model
    seen.clear()
    model(IMAGE)
    fused(IMAGE)
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


def test_a_hook_that_changes_the_batch_norm_input_is_respected() -> None:
    model = trained(ConvBn(), IMAGE)
    model.bn.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    check(model, IMAGE)


def test_a_hook_on_the_conv_input_stays_and_is_right() -> None:
    model = trained(ConvBn(), IMAGE)
    model.conv.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    check(model, IMAGE)


def test_a_hook_on_the_batch_norm_output_stays_and_is_right() -> None:
    model = trained(ConvBn(), IMAGE)
    model.bn.register_forward_hook(lambda module, args, output: output.abs())
    result = check(model, IMAGE)
    assert (result.model(IMAGE) >= 0).all()


def test_a_global_module_hook_is_respected() -> None:
    from torch.nn.modules.module import register_module_forward_hook

    def double_convs(module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        return output * 2 if isinstance(module, nn.Conv2d) else None

    model = trained(ConvBn(), IMAGE)
    handle = register_module_forward_hook(double_convs)
    try:
        check(model, IMAGE)
    finally:
        handle.remove()


def test_a_backward_hook_on_the_batch_norm_is_not_lost_in_silence() -> None:
    model = trained(ConvBn(), IMAGE)
    model.bn.register_full_backward_hook(lambda module, grads, outputs: None)
    result = check(model, IMAGE)
    assert not result.plan.fusions or result.model.bn._backward_hooks


def test_a_hook_before_the_conv_that_may_read_its_weight_is_respected() -> None:
    model = trained(ConvBn(), IMAGE)

    def scaled(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor | None:
        return args[0] * module.weight.mean() if args[0].shape[0] == 5 else None

    model.conv.register_forward_pre_hook(scaled)
    assert_skipped(model, IMAGE, because="hook")


def test_a_hook_elsewhere_that_holds_the_conv_is_respected() -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), IMAGE)
    conv, five = model[0], like(IMAGE, 3, 5)

    def scaled(module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        return output * conv.weight.mean() if len(output) == 5 else None

    model[2].register_forward_hook(scaled)
    expected = model(five)
    torchfuse.fuse(model, IMAGE, inplace=True, verify=False)  # (a copy's hook would hold the old)
    assert torch.equal(model(five), expected)


def test_a_state_dict_hook_of_the_model_that_handles_keys_of_the_norm_is_respected() -> None:
    model = trained(ConvBn(), IMAGE)

    def renamed(module: nn.Module, state: dict, prefix: str, metadata: object) -> None:
        state[f"{prefix}norm.weight"] = state.pop(f"{prefix}bn.weight")

    model._register_state_dict_hook(renamed)
    result = assert_skipped(model, IMAGE, because="state_dict hook of `the model`.*`bn`")
    assert "norm.weight" in result.model.state_dict()


def test_a_state_dict_hook_of_the_model_about_something_else_is_no_obstacle() -> None:
    model = trained(ConvBn(), IMAGE)
    model._register_state_dict_hook(lambda module, state, prefix, metadata: state)
    assert_fuses(model, IMAGE)
