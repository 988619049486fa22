"""A copy runs on weights of its own, and the original stays as it is; or there is no copy."""

import copy
import functools
import re
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchfuse
from support.fusing_checks import IMAGE, ConvBn, assert_same, trained
from torchfuse.errors import FusionError
from torchfuse.isolation.model_copy import copied


class Net(ConvBn):
    def twice(self, x: Tensor) -> Tensor:
        return 2 * self.bn(self.conv(x))


def thrice(self: nn.Module, x: Tensor) -> Tensor:
    return 3 * self.bn(self.conv(x))


def closure(net: nn.Module) -> Callable[[Tensor], Tensor]:
    old = net.forward

    def forward(x: Tensor) -> Tensor:
        return 3 * old(x)

    return forward


def decorated(net: nn.Module) -> Callable[[Tensor], Tensor]:
    old = net.forward

    @functools.wraps(old)
    def forward(*args: object, **kwargs: object) -> Tensor:
        return old(*args, **kwargs)

    return forward


def twice_decorated(net: nn.Module) -> Callable[[Tensor], Tensor]:
    once = decorated(net)

    @functools.wraps(once)
    def forward(*args: object) -> Tensor:
        return once(*args)

    return forward


def wrapped_and_kept(net: nn.Module) -> Callable[[Tensor], Tensor]:
    net.old_forward = net.forward

    def forward(module: nn.Module, *args: Tensor) -> Tensor:
        return 3 * module.old_forward(*args)

    return functools.update_wrapper(functools.partial(forward, net), net.old_forward)


def bound_closure(net: nn.Module) -> Callable[[Tensor], Tensor]:
    modules = {"all": [net]}
    return types.MethodType(lambda self, x: self.bn(modules["all"][0].conv(x)), net)


def recursive(net: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor, depth: int = 1) -> Tensor:
        return forward(x, depth - 1) if depth else net.twice(x)

    return forward


class Callable3:
    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, x: Tensor) -> Tensor:
        return thrice(self.net, x)


FORWARDS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "a method of another": lambda net: types.MethodType(thrice, net),
    "another method of its own": lambda net: net.twice,
    "a partial of a function": lambda net: functools.partial(thrice, net),
    "a partial of a method": lambda net: functools.partial(net.twice),
    "a partial of a closure": lambda net: functools.partial(closure(net)),
    "a lambda": lambda net: lambda x: net.bn(net.conv(x)),
    "a default": lambda net: lambda x, net=net: net.bn(net.conv(x)),
    "a closure over the old one": closure,
    "a decorated one": decorated,
    "two decorators": twice_decorated,
    "a wrapper that keeps the old one": wrapped_and_kept,
    "a bound closure": bound_closure,
    "a recursive one": recursive,
    "a callable object": Callable3,
}


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "not verified"])
@pytest.mark.parametrize("at", ["root", "child"])
@pytest.mark.parametrize("name", FORWARDS)
def test_a_forward_that_was_replaced_runs_the_copy(name: str, at: str, verify: bool) -> None:
    net = trained(Net(), IMAGE)
    net.forward = FORWARDS[name](net)
    model = net if at == "root" else nn.Sequential(net)
    expected = model(IMAGE)
    result = torchfuse.fuse(model, IMAGE, verify=verify)
    assert len(result.plan.fusions) == 1, str(result.plan)
    assert_same(expected, result.model(IMAGE))
    with torch.no_grad():
        for parameter in result.model.parameters():
            parameter.zero_()
    assert not result.model(IMAGE).any()
    assert torch.equal(model(IMAGE), expected)


def test_a_forward_that_was_replaced_runs_the_copy_of_fuse_modules() -> None:
    net = trained(Net(), IMAGE)
    net.forward = closure(net)
    fused = torchfuse.fuse_modules(net, ["conv", "bn"])
    assert_same(net(IMAGE), fused(IMAGE))
    nn.init.zeros_(fused.conv.weight)
    nn.init.zeros_(fused.conv.bias)
    assert not fused(IMAGE).any()


def test_a_hook_of_the_copy_knows_the_copy() -> None:
    model = trained(Net(), IMAGE)
    model.seen = []
    model.register_forward_hook(lambda module, args, output: model.seen.append(output.shape))
    made = copied(model)
    made(IMAGE)
    assert len(made.seen) == 1
    assert model.seen == []


def test_a_function_that_knows_no_module_stays_the_same() -> None:
    model, counted = Net(), []
    model.count = lambda: counted.append(1)
    made = copied(model)
    assert made.count is model.count


class ItsOwnCopy(ConvBn):
    def __deepcopy__(self, memo: object) -> nn.Module:
        return self


class ConvItsOwnCopy(nn.Conv2d):
    def __deepcopy__(self, memo: object) -> nn.Module:
        return self


class SharesChildren(Net):
    def __deepcopy__(self, memo: object) -> nn.Module:
        made = copy.copy(self)
        made._modules = dict(self._modules)
        return made


class SharesWeights(nn.Conv2d):
    def __deepcopy__(self, memo: object) -> nn.Module:
        made = copy.copy(self)
        made._parameters = dict(self._parameters)
        return made


SHARING = {
    "the model": (lambda: ItsOwnCopy(), "it is the same"),
    "a part": (lambda: nn.Sequential(ItsOwnCopy()), "`0` (ItsOwnCopy) is the same"),
    "a layer": (lambda: ConvBn(ConvItsOwnCopy(4, 4, 3)), "`conv` (ConvItsOwnCopy) is the same"),
    "children": (lambda: nn.Sequential(SharesChildren()), "`0.conv` (Conv2d) is the same"),
    "weights": (lambda: ConvBn(SharesWeights(4, 4, 3)), "`conv.weight` (Parameter) is the same"),
}


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "not verified"])
@pytest.mark.parametrize("name", SHARING)
def test_what_is_its_own_copy_is_refused_and_left_as_it_is(name: str, verify: bool) -> None:
    make, reason = SHARING[name]
    model = trained(make(), IMAGE)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(IMAGE)
    with pytest.raises(FusionError, match=f"{re.escape(reason)} object in the copy.*inplace=True"):
        torchfuse.fuse(model, IMAGE, verify=verify)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(model(IMAGE), expected)
    result = torchfuse.fuse(model, IMAGE, verify=verify, inplace=True)
    assert len(result.plan.fusions) == 1
    with pytest.raises(FusionError, match=re.escape(reason)):
        torchfuse.unfuse(result.model)


def test_fuse_modules_refuses_what_is_its_own_copy() -> None:
    model = trained(nn.Sequential(ItsOwnCopy()), IMAGE)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(FusionError, match=r"`0` \(ItsOwnCopy\) is the same object in the copy"):
        torchfuse.fuse_modules(model, ["0.conv", "0.bn"])
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


REGISTRY: dict[str, nn.Module] = {}


class Registered(Net):
    def forward(self, x: Tensor) -> Tensor:
        return REGISTRY["net"].twice(x)


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "not verified"])
def test_a_copy_that_runs_the_original_by_a_global_name_is_refused(verify: bool) -> None:
    model = REGISTRY["net"] = Registered()
    trained(model, IMAGE)
    with pytest.raises(FusionError, match=r"runs the original \(its `conv`\).*inplace=True"):
        torchfuse.fuse(model, IMAGE, verify=verify)
    assert len(torchfuse.fuse(model, IMAGE, verify=verify, inplace=True).plan.fusions) == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_the_parameters_of_a_scripted_part_are_leaves_as_they_were():
    model = nn.Sequential(torch.jit.script(nn.Linear(2, 2)), nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    found = copied(model)
    assert all(parameter.is_leaf for parameter in found.parameters())
    assert [p.requires_grad for p in found.parameters()] == [True, False, True, True]
    found.half()  # reads each `.grad`, of which torch warns where it is no leaf
