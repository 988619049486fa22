"""Both columns of the table in docs/fuse_modules.md, run."""

import contextlib
import warnings

import pytest
import torch
from torch import nn
from torch.ao import quantization as ao

import torchfuse
from torchfuse.errors import FusionError, FusionWarning, InputError

INPUT = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
BOTH = pytest.mark.parametrize(
    "fuse", [ao.fuse_modules, torchfuse.fuse_modules], ids=["torch", "ours"]
)


def settled(*layers):
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        if norm.track_running_stats:
            nn.init.uniform_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return model.eval()


def conv_bn(*more):
    return settled(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), *more)


def outcome(fuse, model, names=("0", "1"), **options):
    """Return what `fuse` raised, or warned of, or else the error of its result."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FusionWarning)
            fused = fuse(model, list(names), **options)
    except Exception as error:  # noqa: BLE001  # which one is what the test asks
        return type(error)
    if caught:
        return caught[0].category
    inputs = INPUT[:, :, 0, 0] if isinstance(model[0], nn.Linear) else INPUT
    with torch.no_grad():
        return "right" if torch.allclose(fused(inputs), model(inputs), atol=1e-5) else "wrong"


def tied():
    model = conv_bn(nn.Conv2d(4, 4, 3))
    model[2].weight = model[0].weight
    return model


def shared():
    conv = nn.Conv2d(4, 4, 1)
    return settled(conv, nn.BatchNorm2d(4), conv)


def weight_norm_by_hook():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still in use
        return settled(nn.utils.weight_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4))


def weight_norm_by_parametrization():
    return settled(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4))


def with_a_hook_in_the_middle():
    model = conv_bn()
    model[0].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("make", "torchs", "ours"),
    [
        (lambda: settled(nn.Conv2d(4, 4, 3), nn.ReLU6()), AssertionError, FusionWarning),
        (lambda: settled(nn.Conv2d(4, 4, 3)), AttributeError, InputError),
        (
            lambda: settled(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)),
            RuntimeError,
            "right",
        ),
        (lambda: settled(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)), TypeError, "right"),
        (
            lambda: settled(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
            AssertionError,
            FusionError,
        ),
        (weight_norm_by_hook, RuntimeError, FusionError),
        (weight_norm_by_parametrization, KeyError, FusionError),
        (shared, "right", FusionError),  # right, and no longer shared
        (tied, "right", FusionError),  # right, and no longer tied
        (with_a_hook_in_the_middle, "right", FusionWarning),
    ],
    ids=[
        "unsupported sequence",
        "unknown name",
        "grouped ConvTranspose",
        "linear, affine=False",
        "no running statistics",
        "weight_norm by hook",
        "weight_norm by parametrization",
        "shared module",
        "tied weight",
        "hook in the middle",
    ],
)
def test_what_becomes_of(make, torchs, ours):
    assert outcome(ao.fuse_modules, make()) == torchs
    assert outcome(torchfuse.fuse_modules, make()) == ours


@BOTH
def test_a_refused_list_in_place(fuse):
    model = conv_bn(nn.ReLU(), nn.BatchNorm2d(4, track_running_stats=False))
    with contextlib.suppress(AssertionError, FusionError):
        fuse(model, [["0", "1"], ["0", "3"]], inplace=True)
    assert type(model[1]) is (nn.Identity if fuse is ao.fuse_modules else nn.BatchNorm2d)


@BOTH
def test_a_pre_hook_on_the_first_module(fuse):
    model, fired = conv_bn(), []
    model[0].register_forward_pre_hook(lambda *_: fired.append(1))
    fuse(model, ["0", "1"])(INPUT)
    assert len(fired) == (2 if fuse is ao.fuse_modules else 1)


@BOTH
def test_the_handle_of_a_hook_that_moved(fuse):
    model, fired = conv_bn(nn.ReLU()), []
    handle = model[2].register_forward_hook(lambda *_: fired.append(1))
    fuse(model, ["0", "1", "2"], inplace=True)
    handle.remove()
    model(INPUT)
    assert len(fired) == (1 if fuse is ao.fuse_modules else 0)


@BOTH
def test_qconfig_and_training_flag_of_the_fused_module(fuse):
    model = conv_bn(nn.ReLU())
    model[0].qconfig = None
    fused = fuse(model, ["0", "1", "2"])[0]
    theirs = fuse is ao.fuse_modules
    assert hasattr(fused, "qconfig") is not theirs
    assert fused.training is theirs


@BOTH
def test_half_precision(fuse):
    conv, norm = model = conv_bn().to(torch.bfloat16)
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    rounded_once = (conv.weight.double() * scale.reshape(-1, 1, 1, 1)).to(torch.bfloat16)
    folded = fuse(model, ["0", "1"])[0].weight
    assert torch.equal(folded, rounded_once) is (fuse is torchfuse.fuse_modules)
