"""Fusing by name: every sequence computes the same, everything else says why not."""

import copy
import inspect
import warnings

import pytest
import torch
import torch.ao.nn.intrinsic as nni
from torch import nn
from torch.ao import quantization as ao
from torch.ao.quantization.fuse_modules import fuse_known_modules as torchs_own_fuser

import torchfuse
from torchfuse.errors import FusionError, FusionWarning, InputError
from torchfuse.fusing.by_name import SUPPORTED_SEQUENCES
from torchfuse.fusing.by_name.sequences import type_names

# A fold rounds once to the weight's dtype; the layer's sum then carries that rounding. Relative to
# the output's largest value.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def assert_same_output(fused, reference, inputs):
    with torch.no_grad():
        expected, got = reference(inputs), fused(inputs)
    assert got.dtype == expected.dtype
    difference = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert difference <= TOLERANCE[inputs.dtype]


def settled(*layers, dtype=torch.float32):
    """Return a Sequential in eval mode whose batch norms are far from the identity."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2.0)
                nn.init.uniform_(module.bias, -1.0, 1.0)
            if module.track_running_stats:
                nn.init.uniform_(module.running_mean, -1.0, 1.0)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval().to(dtype)


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SIZE = {1: (2, 4, 9), 2: (2, 4, 7, 6), 3: (2, 4, 5, 6, 4)}


def names(model):
    return [str(i) for i in range(len(model))]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("groups", [1, 2, 4], ids=lambda groups: f"groups {groups}")
@pytest.mark.parametrize("dims", [1, 2, 3], ids=lambda dims: f"{dims}d")
@pytest.mark.parametrize("layers", [CONV, TRANSPOSED], ids=["conv", "conv_transpose"])
def test_a_batch_norm_folds_into_a_conv(layers, dims, groups, bias, dtype):
    conv = layers[dims](4, 8, 3, groups=groups, bias=bias)
    model = settled(conv, NORM[dims](8), dtype=dtype)
    inputs = torch.randn(SIZE[dims]).to(dtype)
    fused = torchfuse.fuse_modules(model, ["0", "1"], example_inputs=inputs)
    assert [type(module) for module in fused] == [layers[dims], nn.Identity]
    assert_same_output(fused, model, inputs)


@pytest.mark.parametrize("dims", [1, 2, 3], ids=lambda dims: f"{dims}d")
def test_conv_batch_norm_and_relu_become_a_conv_relu(dims):
    conv = CONV[dims](4, 8, 3, padding=1, padding_mode="reflect")
    model = settled(conv, NORM[dims](8), nn.ReLU())
    fused = torchfuse.fuse_modules(model, names(model))
    expected = {1: nni.ConvReLU1d, 2: nni.ConvReLU2d, 3: nni.ConvReLU3d}[dims]
    assert [type(module) for module in fused] == [expected, nn.Identity, nn.Identity]
    assert_same_output(fused, model, torch.randn(SIZE[dims]))


@pytest.mark.parametrize(
    ("layers", "size", "expected"),
    [
        ((nn.Conv1d(4, 8, 3), nn.ReLU()), SIZE[1], nni.ConvReLU1d),
        ((nn.Conv2d(4, 8, 3), nn.ReLU()), SIZE[2], nni.ConvReLU2d),
        ((nn.Conv3d(4, 8, 3), nn.ReLU()), SIZE[3], nni.ConvReLU3d),
        ((nn.Linear(4, 8), nn.ReLU()), (3, 4), nni.LinearReLU),
        ((nn.BatchNorm2d(4), nn.ReLU()), SIZE[2], nni.BNReLU2d),
        ((nn.BatchNorm3d(4), nn.ReLU()), SIZE[3], nni.BNReLU3d),
        ((nn.Linear(4, 8), nn.BatchNorm1d(8)), (3, 4), nn.Linear),
        ((nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8, affine=False)), (3, 4), nn.Linear),
        ((nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, affine=False)), SIZE[2], nn.Conv2d),
    ],
    ids=str,
)
def test_every_other_sequence_is_fused_into_the_class_that_torch_knows(layers, size, expected):
    model = settled(*layers)
    inputs = torch.randn(size)
    fused = torchfuse.fuse_modules(model, names(model), example_inputs=inputs)
    assert [type(module) for module in fused] == [expected, nn.Identity]
    assert_same_output(fused, model, inputs)


def made(kind):
    if "Conv" in kind.__name__:
        return kind(4, 4, 3)
    return kind(4, 4) if kind is nn.Linear else kind() if kind is nn.ReLU else kind(4)


@pytest.mark.parametrize("sequence", SUPPORTED_SEQUENCES, ids=type_names)
def test_fused_types_and_keys_equal_those_of_torch(sequence):
    model = settled(*map(made, sequence))
    ours = torchfuse.fuse_modules(model, names(model))
    theirs = ao.fuse_modules(model, names(model))
    assert list(map(type, ours.modules())) == list(map(type, theirs.modules()))
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("ours", [torchfuse.fuse_modules, torchfuse.fuse_modules_qat])
def test_the_signature_begins_with_that_of_torch(ours):
    theirs = inspect.signature(getattr(ao, ours.__name__)).parameters
    assert list(inspect.signature(ours).parameters)[: len(theirs)] == list(theirs)


def test_fusing_a_copy_leaves_the_original_bit_identical():
    model = settled(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    before = copy.deepcopy(model.state_dict())
    fused = torchfuse.fuse_modules(model, [["0", "1", "2"]])
    assert [type(module) for module in model] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    fused[0][0].weight.data.zero_()
    assert torch.equal(model[0].weight, before["0.weight"])


def test_fusing_in_place_returns_the_same_model():
    model = settled(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    assert torchfuse.fuse_modules(model, ["0", "1"], inplace=True) is model
    assert type(model[1]) is nn.Identity


def test_training_flags_requires_grad_layout_and_qconfig_are_kept():
    model = settled(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    model.to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    model[0].qconfig = None  # this layer is to stay in float
    fused = torchfuse.fuse_modules(model, names(model))
    assert not any(module.training for module in fused.modules())
    assert not fused[0][0].weight.requires_grad
    assert fused[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert fused[0].qconfig is None


def test_a_bfloat16_conv_before_a_float32_batch_norm_is_folded():
    conv = nn.Conv2d(4, 8, 3).to(torch.bfloat16)
    model = settled(nn.Identity(), settled(nn.BatchNorm2d(8)))
    model[0] = conv.eval()
    fused = torchfuse.fuse_modules(model, ["0", "1.0"])
    assert fused[0].weight.dtype == torch.bfloat16
    assert_same_output(fused, model, torch.randn(SIZE[2]).to(torch.bfloat16))


# ---- skipped, and says why


@pytest.mark.parametrize(
    ("layers", "fuse", "message"),
    [
        (
            (nn.Conv2d(4, 8, 3), nn.ReLU6()),
            torchfuse.fuse_modules,
            r"left 0 \(Conv2d\), 1 \(ReLU6\) unchanged: no way to fuse Conv2d → ReLU6 is known; "
            r"supported sequences are conv-bn, conv-bn-relu, conv-relu",
        ),
        ((nn.BatchNorm1d(4), nn.ReLU()), torchfuse.fuse_modules, "BatchNorm1d → ReLU"),
        (
            (nn.ConvTranspose2d(4, 8, 3), nn.BatchNorm2d(8)),
            torchfuse.fuse_modules_qat,
            "no quantization-aware class for ConvTranspose2d → BatchNorm2d",
        ),
    ],
    ids=["conv-relu6", "bn1d-relu", "conv_transpose-bn for QAT"],
)
def test_an_unsupported_sequence_is_skipped_with_a_warning(layers, fuse, message):
    model = settled(*layers)
    with pytest.warns(FusionWarning, match=message):
        fused = fuse(model, names(model))
    assert [type(module) for module in fused] == [type(module) for module in layers]
    with pytest.raises(FusionError, match="cannot fuse 0"):
        fuse(model, names(model), strict=True)


def tied():
    model = settled(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    model[2].weight = model[0].weight
    return model


def tied_through_a_view():
    model = settled(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = nn.Parameter(model[0].weight.detach().t())
    return model


def shared():
    conv = nn.Conv2d(4, 4, 3)
    return settled(conv, nn.BatchNorm2d(4), conv)


def with_old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still in use
        return settled(nn.utils.weight_norm(nn.Conv2d(4, 8, 3)), nn.BatchNorm2d(8))


def with_mixed_modes():
    model = settled(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    model[0].train()
    return model


def in_half(weight, gamma):
    model = settled(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), dtype=torch.float16)
    nn.init.constant_(model[0].weight, weight)
    nn.init.constant_(model[1].weight, gamma)
    return model


def with_variance(value):
    model = settled(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, eps=0.0))
    nn.init.constant_(model[1].running_var, value)
    return model


def with_norm_in(dtype):
    model = settled(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    model[1].to(dtype)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (settled(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).train(), "call model.eval"),
        (with_mixed_modes(), "must all be in training mode or all in eval mode"),
        (
            settled(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(6)),
            "8 output channels and the batch norm 6",
        ),
        (
            settled(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)),
            "no running statistics",
        ),
        (shared(), "0 is also used as 2"),
        (tied(), "0.weight is tied to 2.weight"),
        (tied_through_a_view(), "0.weight is tied to 2.weight"),
        (with_old_weight_norm(), "computed before each call, as by weight_norm"),
        (
            settled(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3)), nn.BatchNorm2d(8)),
            "parametrized: bake it in first",
        ),
        (with_norm_in(torch.float64), "convert one of them first"),
        (in_half(60.0, 2000.0), "would not be finite in torch.float16"),
        (in_half(1e-3, 3e-5), "would lose more than rounding in torch.float16"),
        (with_variance(0.0), "would not be finite in torch.float32"),
        (with_variance(float("nan")), "would not be finite in torch.float32"),
        (
            nn.Sequential(nn.Conv2d(4, 8, 3, device="meta"), nn.BatchNorm2d(8)).eval(),
            "Conv2d is on meta and the batch norm on cpu: move them to one device",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_folded_exactly_is_refused_and_nothing_is_changed(model, message):
    types_before = [type(module) for module in model]
    with pytest.raises(FusionError, match=message):
        torchfuse.fuse_modules(model, ["0", "1"], inplace=True)
    assert [type(module) for module in model] == types_before


@pytest.mark.parametrize("attribute", ["affine", "track_running_stats"])
def test_quantization_aware_training_needs_a_whole_batch_norm(attribute):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, **{attribute: False}))
    with pytest.raises(FusionError, match=f"{attribute}=False"):
        torchfuse.fuse_modules_qat(model, ["0", "1"])


def test_a_name_that_does_not_exist_lists_near_matches():
    model = settled(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)))
    with pytest.raises(InputError, match=r"Sequential has no module '0.2'; near matches: 0"):
        torchfuse.fuse_modules(model, [["0.0", "0.2"]])


@pytest.mark.parametrize("wrong", ["conv", 3, [["0"], "1"], [[]], [[0, 1]]], ids=repr)
def test_what_is_no_list_of_names_is_an_error(wrong):
    with pytest.raises(InputError, match="must be a list of module names"):
        torchfuse.fuse_modules(settled(nn.Conv2d(4, 8, 3)), wrong)


def test_a_refused_list_takes_back_the_lists_before_it():
    model = settled(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(6))
    fired = []
    model[0].register_forward_pre_hook(lambda *_: fired.append(1))
    with pytest.raises(FusionError, match="8 output channels"):
        torchfuse.fuse_modules(model, [["0", "1"], ["2", "3"]], inplace=True)
    assert [type(module) for module in model] == [nn.Conv2d, nn.BatchNorm2d] * 2
    model[:2](torch.randn(SIZE[2]))
    assert fired == [1]


# ---- hooks


def test_hooks_move_along_fire_once_and_keep_their_handles():
    model = settled(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    fired = []
    handles = [
        model[0].register_forward_pre_hook(
            lambda module, args, kwargs: fired.append("pre"), with_kwargs=True
        ),
        model[2].register_forward_hook(lambda *_: fired.append("post"), always_call=True),
    ]
    torchfuse.fuse_modules(model, names(model), inplace=True)
    model(torch.randn(SIZE[2]))
    assert fired == ["pre", "post"]
    for handle in handles:
        handle.remove()
    model(torch.randn(SIZE[2]))
    assert fired == ["pre", "post"]


def test_a_hook_on_a_value_that_is_gone_is_named_in_a_warning():
    model = settled(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    model[0].register_forward_hook(lambda *_: None)
    with pytest.warns(FusionWarning, match="dropped the forward hook of 0: nothing left"):
        fused = torchfuse.fuse_modules(model, ["0", "1"])
    assert not fused[0]._forward_hooks
    with pytest.raises(FusionError, match="the forward hook of 0 would be lost"):
        torchfuse.fuse_modules(model, ["0", "1"], strict=True)


def test_a_backward_hook_on_the_conv_is_dropped_as_the_warning_says():
    model = settled(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    model[0].register_full_backward_hook(lambda *_: pytest.fail("fired"))
    with pytest.warns(FusionWarning, match="dropped the backward hook of 0"):
        fused = torchfuse.fuse_modules(model, ["0", "1"], inplace=True)
    fused(torch.randn(SIZE[2])).sum().backward()


def test_modules_on_the_meta_device_are_refused():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, device="meta"),
        nn.BatchNorm2d(8, device="meta"),
        nn.Conv2d(8, 8, 3, device="meta"),
    )
    with pytest.raises(FusionError, match="on the meta device there are no values"):
        torchfuse.fuse_modules(model.eval(), ["0", "1"])


# ---- custom fusers


def test_a_fuser_method_that_returns_the_first_module_keeps_its_hooks():
    model, fired = settled(nn.Conv2d(4, 8, 3), nn.Dropout()), []
    model[0].register_forward_pre_hook(lambda *_: fired.append("conv pre"))
    model[0].register_forward_hook(lambda *_: fired.append("conv"))
    model[1].register_forward_hook(lambda *_: fired.append("dropout"))
    method = {(nn.Conv2d, nn.Dropout): lambda is_qat, conv, dropout: conv}
    fused = torchfuse.fuse_modules(
        model, ["0", "1"], fuse_custom_config_dict={"additional_fuser_method_mapping": method}
    )
    fused(torch.randn(SIZE[2]))
    assert fired == ["conv pre", "conv", "dropout"]


def test_an_additional_fuser_method_is_used_for_its_types():
    method = {(nn.Conv2d, nn.ReLU6): lambda is_qat, conv, act: nn.Sequential(conv, act)}
    model = settled(nn.Conv2d(4, 8, 3), nn.ReLU6())
    fused = torchfuse.fuse_modules(
        model, ["0", "1"], fuse_custom_config_dict={"additional_fuser_method_mapping": method}
    )
    assert [type(module) for module in fused] == [nn.Sequential, nn.Identity]
    assert_same_output(fused, model, torch.randn(SIZE[2]))


def test_torch_own_fuser_function_can_be_passed():
    model = settled(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    fused = torchfuse.fuse_modules(model, ["0", "1"], fuser_func=torchs_own_fuser)
    assert_same_output(fused, model, torch.randn(SIZE[2]))


def test_a_fuser_function_that_returns_too_few_modules_is_an_error():
    model = settled(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    with pytest.raises(FusionError, match="as many modules as it is given, 2, and returned 1"):
        torchfuse.fuse_modules(model, ["0", "1"], fuser_func=lambda modules, *_: modules[:1])
