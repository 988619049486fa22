"""Functions that hang on modules (hooks, lambdas, bound methods), and modules in attributes."""

from functools import partial
from types import MethodType, SimpleNamespace

from torch import nn

from torchfuse.conditions.attached import attached
from torchfuse.isolation.held_modules import modules_in


def stem(model, x):
    return model[0](x)


def hook(module, args, output):
    return None


def model_with(**attributes):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    vars(model).update(attributes)
    return model


def found_in(model):
    entries = attached(dict(model.named_modules(remove_duplicate=False)))
    return [(entry.where, entry.path, entry.owner, entry.is_hook) for entry in entries]


def test_a_bound_method_knows_what_it_is_bound_to():
    model = model_with()
    model.stem = MethodType(stem, model)
    assert found_in(model) == [("stem", "", None, False)]


def test_a_lambda_knows_what_is_in_its_closure_by_name():
    model = model_with()
    model.stem = lambda x: model[0](x)
    conv = model[0]
    model.tools = {"stem": [lambda x: conv(x)]}
    assert found_in(model) == [("stem", "", "model", False), ("tools", "0", "conv", False)]


def test_a_hook_knows_the_module_it_is_on():
    model = model_with()
    model[0].register_forward_hook(hook)
    model[1].register_forward_pre_hook(lambda module, args: None)
    assert found_in(model) == [
        ("0._forward_hooks", "0", None, True),
        ("1._forward_pre_hooks", "1", None, True),
    ]


def test_a_forward_of_its_own_and_functions_that_know_no_module_are_left_out():
    assert found_in(model_with(forward=lambda x: x, scale=lambda x: x * 2)) == []


def test_modules_are_found_in_containers_closures_and_plain_objects():
    conv = nn.Conv2d(4, 4, 1)
    holders = [
        conv,
        [conv],
        {"a": (conv,)},
        conv.forward,
        partial(stem, conv),
        lambda x: conv(x),
        SimpleNamespace(inner=SimpleNamespace(layer=conv)),
    ]
    assert [list(modules_in(holder)) for holder in holders] == [[conv]] * len(holders)
    for other in (3, "conv", nn.Conv2d, stem, [None], conv.weight):
        assert list(modules_in(other)) == []
