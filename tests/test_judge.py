"""The judge of the random networks sees what it is there to see."""

import copy
from collections.abc import Callable
from random import Random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import torchfuse
from support.judge import problems
from support.networks import Network, network
from torchfuse.algebra.folding import ChannelAffine


def drawn() -> Network:
    """Return a network that has a convolution which matters to its output."""
    return network(Random(2), 2)


def scaled(model: nn.Module) -> nn.Module:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        next(changed.parameters()).mul_(1.01)
    return changed


def renamed(model: nn.Module) -> nn.Module:
    changed = copy.deepcopy(model)
    changed.extra = nn.Identity()
    return changed


def judged(
    monkeypatch: pytest.MonkeyPatch,
    fuse: Callable[[nn.Module], nn.Module],
    unfuse: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> list[str]:
    plan = SimpleNamespace(to_json=lambda: "{}", fusions=())
    monkeypatch.setattr(
        torchfuse,
        "fuse",
        lambda model, inputs, verify=True: SimpleNamespace(model=fuse(model), plan=plan),
        raising=False,
    )
    monkeypatch.setattr(torchfuse, "plan", lambda model, inputs: plan, raising=False)
    monkeypatch.setattr(torchfuse, "unfuse", unfuse, raising=False)
    return problems(drawn())


def test_a_copy_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judged(monkeypatch, copy.deepcopy) == []


def test_a_weight_that_is_one_percent_off_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert any("differs by" in line for line in judged(monkeypatch, scaled))


def test_a_fold_that_is_one_percent_off_is_seen_in_every_kind_of_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = ChannelAffine.of_batch_norm

    def off(*statistics: object) -> ChannelAffine:
        affine = right(*statistics)
        return ChannelAffine(affine.scale * 1.01, affine.shift)

    kinds = set()
    for seed in range(40):
        one = network(Random(seed), seed)
        if torchfuse.plan(one.model, one.inputs(0)).fusions:
            kinds.add(one.rough)
            with monkeypatch.context() as patch:
                patch.setattr(ChannelAffine, "of_batch_norm", off)
                found = problems(one)
            assert any(line.startswith("unproved, ") for line in found), one.source
    assert kinds == {True, False}


def test_an_original_that_changed_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_place(model: nn.Module) -> nn.Module:
        result = copy.deepcopy(model)
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1e-6
        return result

    assert any("the original changed" in line for line in judged(monkeypatch, in_place))


@pytest.mark.parametrize("unfuse", [scaled, renamed])
def test_an_unfused_model_that_is_another_is_wrong(
    monkeypatch: pytest.MonkeyPatch, unfuse: Callable[[nn.Module], nn.Module]
) -> None:
    found = judged(monkeypatch, copy.deepcopy, unfuse)
    assert any("unfuse did not restore" in line for line in found)


def test_a_fused_model_that_raises_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module) -> nn.Module:
        changed = copy.deepcopy(model)
        changed.register_forward_pre_hook(lambda module, args: args[0].view(-1, 7, 11, 13))
        return changed

    assert any("the fused model raises" in line for line in judged(monkeypatch, broken))
