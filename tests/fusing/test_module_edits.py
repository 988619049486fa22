"""One fusion goes into a model, and comes back out of it, bit for bit."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from support.fusing_checks import IMAGE, ConvBn, relative_difference, trained
from torchfuse.errors import FusionError
from torchfuse.fusing.module_edits import (
    Fusions,
    MergedBlock,
    attach,
    check_unchanged,
    fold_in,
    folded_while_called,
    forget_fusions,
    fusions_of,
    take_back,
    was_fused,
    without_norm,
)
from torchfuse.rules import RULES

RULE = {rule.name: rule for rule in RULES}
PAIR = (("conv",), ("bn",))


@pytest.fixture(params=["plain", "parametrized"])
def model(request):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1)
    if request.param == "parametrized":
        conv = parametrizations.weight_norm(conv)
    return trained(ConvBn(conv), IMAGE)


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def is_in_state(model, state):
    now = model.state_dict()
    return list(now) == list(state) and all(torch.equal(now[key], state[key]) for key in state)


def test_a_fold_goes_in_and_comes_back_out(model):
    expected, before = model(IMAGE), state_of(model)
    folded = fold_in(model, RULE["conv_bn"], *PAIR, keep=True)
    assert type(model.bn) is nn.Identity
    assert relative_difference(expected, model(IMAGE)) < 1e-5
    assert folded.originals_bytes > 0
    take_back(model, folded)
    assert is_in_state(model, before)
    assert torch.equal(model(IMAGE), expected)


def test_what_is_remembered_of_the_original_takes_no_memory(model):
    folded = fold_in(model, RULE["conv_bn"], *PAIR, keep=False)
    for module in (folded.layer, folded.norm):
        assert all(tensor.is_meta for tensor in module.state_dict().values())


def test_a_merged_block_counts_the_memory_of_what_it_keeps():
    block = MergedBlock(
        path="block",
        base=(),
        source="",
        args=(),
        rules=(),
        layers=(),
        modules={},
        tensors={},
        key_map={},
        written={},
        original_modules={"dense": nn.Conv2d(4, 4, 3, bias=False)},
        original_tensors={"gamma": torch.ones(4)},
    )
    assert block.originals_bytes == 4 * (4 * 4 * 9 + 4)
    block.original_modules = block.original_tensors = None
    assert block.originals_bytes == 0


class NormThenRelu(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def test_what_stays_of_a_subclass_says_what_it_is_and_can_be_reset_and_loaded():
    rest = without_norm(NormThenRelu(4))
    assert torch.equal(rest(IMAGE), IMAGE.relu())
    assert "affine=False" in str(rest)
    assert "track_running_stats=False" in str(rest)
    rest.reset_parameters()
    rest.load_state_dict({})  # as from a file that keeps tensors alone, without their version


def test_without_keeping_nothing_of_the_original_stays(model):
    folded = fold_in(model, RULE["conv_bn"], *PAIR, keep=False)
    assert folded.original_layer is None
    assert folded.original_norm is None
    assert folded.originals_bytes == 0
    attach(model, Fusions([folded]))
    with pytest.raises(FusionError, match="keep_originals=False"):
        check_unchanged(model)


def test_known_weights_are_used_as_they_are():
    model = trained(ConvBn(), IMAGE)
    weights = (torch.ones(4, 4, 3, 3), torch.zeros(4))
    fold_in(model, RULE["conv_bn"], *PAIR, keep=False, weights=weights)
    assert torch.equal(model.conv.weight, weights[0])
    assert torch.equal(model.conv.bias, weights[1])


def test_while_called_it_is_folded_and_afterwards_as_before(model):
    expected, before = model(IMAGE), state_of(model)
    hooks = len(model.conv._forward_pre_hooks)
    with folded_while_called(model, RULE["conv_bn"], *PAIR):
        assert type(model.bn) is nn.Identity
        assert relative_difference(expected, model(IMAGE)) < 1e-5
        assert relative_difference(expected, model(IMAGE)) > 0
    assert is_in_state(model, before)
    assert torch.equal(model(IMAGE), expected)
    assert len(model.conv._forward_pre_hooks) == hooks


def test_while_called_a_layer_that_fails_is_as_before():
    model = trained(ConvBn(), IMAGE)
    before = state_of(model)
    with folded_while_called(model, RULE["conv_bn"], *PAIR), pytest.raises(RuntimeError):
        model(IMAGE[:, :3])
    assert is_in_state(model, before)


def test_changed_weights_are_noticed_before_anything_is_undone(model):
    folded = fold_in(model, RULE["conv_bn"], *PAIR, keep=True)
    attach(model, Fusions([folded]))
    check_unchanged(model)
    with torch.no_grad():
        model.conv.bias[0] += 1
    with pytest.raises(FusionError, match="`conv` have changed"):
        check_unchanged(model)


def test_a_hook_that_computes_the_weight_goes_and_comes_back_before_those_that_stay():
    model = trained(ConvBn(), IMAGE)
    nn.utils.spectral_norm(model.conv)
    model.conv.register_forward_pre_hook(lambda module, args: None)
    hooks, expected = list(model.conv._forward_pre_hooks.values()), model(IMAGE)
    folded = fold_in(model, RULE["conv_bn"], *PAIR, keep=True)
    assert list(model.conv._forward_pre_hooks.values()) == hooks[1:]
    assert relative_difference(expected, model(IMAGE)) < 1e-5
    assert model.conv.weight is model.conv._parameters["weight"]
    model.conv.register_forward_pre_hook(since := lambda module, args: None)
    take_back(model, folded)
    assert list(model.conv._forward_pre_hooks.values()) == [*hooks, since]
    assert torch.equal(model(IMAGE), expected)


def test_all_paths_of_a_module_are_edited():
    model = trained(ConvBn(), IMAGE)
    model.alias, model.norm = model.conv, model.bn
    folded = fold_in(model, RULE["conv_bn"], ("conv", "alias"), ("bn", "norm"), keep=True)
    assert model.norm is model.bn
    assert type(model.norm) is nn.Identity
    take_back(model, folded)
    assert model.norm is model.bn
    assert type(model.norm) is nn.BatchNorm2d


def test_what_was_done_is_remembered_until_it_is_forgotten():
    model = ConvBn()
    assert not was_fused(model)
    done = [Fusions(), Fusions()]
    for one in done:
        attach(model, one)
    assert fusions_of(model) == done
    assert not any("torchfuse" in key for key in model.state_dict())
    forget_fusions(model)
    assert not was_fused(model)


@pytest.mark.parametrize(
    ("has_bias", "has_shift", "frozen", "trains"),
    [
        # what does not train; what trains of the folded weight and bias
        (True, True, (), (True, True)),
        (True, True, ("conv.bias",), (True, False)),
        (True, True, ("conv.weight",), (False, True)),
        (True, True, ("bn.weight", "bn.bias"), (True, True)),
        (True, True, ("conv.weight", "conv.bias"), (False, False)),
        (False, True, ("bn.bias",), (True, False)),
        (False, True, ("conv.weight",), (False, True)),
        (False, True, ("conv.weight", "bn.bias"), (False, False)),
        (False, False, (), (True, True)),
        (False, False, ("conv.weight",), (False, False)),
    ],
)
def test_the_folded_weight_and_bias_train_if_what_they_came_from_does(
    has_bias, has_shift, frozen, trains
):
    model = ConvBn(nn.Conv2d(4, 4, 3, bias=has_bias), nn.BatchNorm2d(4, affine=has_shift)).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    folded = fold_in(model, RULE["conv_bn"], *PAIR, keep=True)
    assert (model.conv.weight.requires_grad, model.conv.bias.requires_grad) == trains
    take_back(model, folded)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
