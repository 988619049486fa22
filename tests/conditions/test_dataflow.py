"""What made what a call reads, who else reads it, and whether channels stay channels on the way."""

import pytest
import torch
from torch import nn

from torchfuse.cases import Case
from torchfuse.conditions.dataflow import keeps_channels, origin, other_readers
from torchfuse.graph.recording import record

IMAGE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """conv, something, batch norm."""

    def __init__(self, between, channels=6, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.bn, self.between = nn.Conv2d(3, 6, 1), norm(channels), between

    def forward(self, x):
        return self.bn(self.between(self.conv(x)))


def traced(between, **options):
    """Return the graph, the conv's call, the calls between, and the batch norm's call."""
    graph = record(Between(between, **options).eval(), [Case((IMAGE,))])
    norm = next(call for call in graph.calls if call.kind == "batch_norm")
    maker, moved = origin(graph, norm)
    return graph, maker, moved, norm


@pytest.mark.parametrize(
    ("between", "kinds"),
    [
        (lambda y: y, []),
        (lambda y: y.contiguous(), ["contiguous"]),
        (lambda y: y.unsqueeze(0).squeeze(0), ["unsqueeze", "squeeze"]),
        (lambda y: torch.dropout(y, 0.5, train=False), ["dropout"]),
        (lambda y: y[:, :, ::2], ["getitem"]),
    ],
)
def test_what_only_moves_elements_is_looked_through(between, kinds):
    _, maker, moved, _ = traced(between)
    assert maker.kind == "conv"
    assert [call.kind for call in moved] == kinds


@pytest.mark.parametrize("between", [torch.relu, lambda y: y * 2, lambda y: y.add_(1)])
def test_what_computes_is_the_origin_itself(between):
    _, maker, moved, _ = traced(between)
    assert maker.kind in ("relu", "mul", "add")
    assert moved == ()


def test_readers_beside_the_way_are_all_others():
    seen = []

    def looked_at(y):
        seen.append((y.mean(), y.view(-1).sum()))
        return y

    graph, maker, moved, norm = traced(looked_at)
    kinds = {call.kind for call in other_readers(graph, (maker, *moved), norm)}
    assert kinds == {"mean", "view", "sum"}


@pytest.mark.parametrize(
    ("between", "options"),
    [
        (lambda y: y, {}),
        (lambda y: y.flatten(2), {"norm": nn.BatchNorm1d}),
        (lambda y: y.permute(0, 1, 3, 2), {}),
        (lambda y: y[:, :, 1:], {}),
        (lambda y: y[:, :, :1, :1].reshape(-1, 6), {"norm": nn.BatchNorm1d}),
        (lambda y: y.permute(0, 2, 3, 1).flatten(0, 2), {"norm": nn.BatchNorm1d}),
    ],
)
def test_channels_that_stay_channels(between, options):
    _, maker, moved, norm = traced(between, **options)
    assert keeps_channels(maker, moved, norm, axis=1)


@pytest.mark.parametrize(
    ("between", "options"),
    [
        (lambda y: y.view(2, 2, 3, 4, 4).transpose(1, 2).reshape(2, 6, 4, 4), {}),  # a shuffle
        (lambda y: y.view(2, 4, 6, 4), {"channels": 4}),
        (lambda y: y.transpose(1, 2), {"channels": 4}),
        (lambda y: y[:, :4], {"channels": 4}),
        (lambda y: y[:, torch.tensor([1, 0, 2, 3, 4, 5])], {}),
    ],
)
def test_channels_that_do_not(between, options):
    _, maker, moved, norm = traced(between, **options)
    assert not keeps_channels(maker, moved, norm, axis=1)
