"""With example inputs, a list that `forward` does not run as written is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.ao import quantization as ao

import torchfuse
from torchfuse.errors import FusionError

INPUT = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """conv, bn, relu as every test wants them; a subclass says in which way they are called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        nn.init.uniform_(self.bn.running_mean, -1.0, 1.0)
        nn.init.uniform_(self.bn.running_var, 0.5, 2.0)


class ReluBeforeNorm(Net):
    def forward(self, x):
        return self.bn(self.relu(self.conv(x)))


class NormBeforeConv(Net):
    def forward(self, x):
        return self.relu(self.conv(self.bn(x)))


class ConvTwice(Net):  # pytorch/pytorch#104593
    def forward(self, x):
        return self.relu(self.bn(self.conv(self.conv(x))))


class SecondUser(Net):  # pytorch/pytorch#197539
    def forward(self, x):
        y = self.conv(x)
        return self.relu(self.bn(y)) + y


class SecondUserOfAView(Net):
    def forward(self, x):
        y = self.conv(x)
        return self.relu(self.bn(y)).mean() + y.flatten(1)[:, 0].sum()


class ReturnsTheConv(Net):
    def forward(self, x):
        y = self.conv(x)
        return self.relu(self.bn(y)), y


class SomethingBetween(Net):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x) * 2))


class ReluAgain(Net):  # pytorch/pytorch#52584
    def forward(self, x):
        return self.relu(-self.relu(self.bn(self.conv(x))))


class NeverCalled(Net):
    def forward(self, x):
        return self.bn(self.conv(x))


class LeavesTheNormOut(Net):
    def forward(self, x):
        y = self.conv(x)
        return self.relu(self.bn(y) if x.shape[2] > 4 else y)


class ConvAlone(Net):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))

    def features(self, x):
        return self.conv(x)


class InOrder(Net):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (ReluBeforeNorm, "forward runs conv, relu, bn"),
        (NormBeforeConv, "forward runs bn, conv, relu"),
        (ConvTwice, "conv runs 2 times"),
        (SecondUser, "the output of conv is read by something else than bn"),
        (SecondUserOfAView, "the output of conv is read by something else than bn"),
        (ReturnsTheConv, "the output of conv is read by something else than bn"),
        (SomethingBetween, "bn does not read the output of conv"),
        (ReluAgain, "relu runs 2 times"),
        (NeverCalled, "relu is never run"),
        (LeavesTheNormOut, "the code takes another path, on which `bn` does not follow `conv`"),
        (ConvAlone, r"ConvAlone\.features, which did not run here, uses `conv` on its own"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.__name__,
)
@pytest.mark.parametrize("inplace", [True, False])
def test_is_refused_before_anything_is_changed(kind, message, inplace):
    model = kind().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FusionError, match=message):
        torchfuse.fuse_modules(model, ["conv", "bn", "relu"], inplace=inplace, example_inputs=INPUT)
    assert [type(module) for module in model.children()] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)


class NothingBetween(Net):
    def forward(self, x):
        y = nn.functional.dropout(self.conv(x), training=self.training).contiguous().detach()
        return self.relu(self.bn(y.view_as(y)))


def test_what_changes_nothing_in_between_is_looked_through():
    model = NothingBetween().eval()
    fused = torchfuse.fuse_modules(model, ["conv", "bn", "relu"], example_inputs=INPUT)
    torch.testing.assert_close(fused(INPUT), model(INPUT))


class ReadsTheWeight(Net):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) + self.conv.weight.sum()


@pytest.mark.parametrize("inplace", [True, False])
def test_a_fused_model_that_cannot_run_is_refused_and_nothing_is_changed(inplace):
    model = ReadsTheWeight().eval()
    with pytest.raises(
        FusionError, match=r"cannot run: .*weight.*; forward may use a listed module"
    ):
        torchfuse.fuse_modules(model, ["conv", "bn", "relu"], inplace=inplace, example_inputs=INPUT)
    assert type(model.conv) is nn.Conv2d


@pytest.mark.parametrize("inplace", [True, False])
def test_a_list_that_runs_in_order_is_fused(inplace):
    model = InOrder().eval()
    expected = model(INPUT)
    fused = torchfuse.fuse_modules(
        model, ["conv", "bn", "relu"], inplace=inplace, example_inputs=INPUT
    )
    assert (fused is model) is inplace
    torch.testing.assert_close(fused(INPUT), expected)


def test_a_training_model_is_checked_too_and_its_statistics_stay():
    model = InOrder().train()
    before = copy.deepcopy(model.state_dict())
    fused = torchfuse.fuse_modules_qat(model, ["conv", "bn", "relu"], example_inputs=INPUT)
    assert type(fused.conv).__name__ == "ConvBnReLU2d"
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    with pytest.raises(FusionError, match="forward runs conv, relu, bn"):
        torchfuse.fuse_modules_qat(
            ReluBeforeNorm().train(), ["conv", "bn", "relu"], example_inputs=INPUT
        )


def test_a_linear_before_a_batch_norm_over_another_axis_is_refused():
    # (N, C, L) with C == L: the linear's features are the last axis, the batch norm's channels the
    # second; pytorch/ao#4116
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    nn.init.uniform_(model[1].running_mean, -1.0, 1.0)
    with pytest.raises(FusionError, match="output differs"):
        torchfuse.fuse_modules(model.eval(), ["0", "1"], example_inputs=torch.randn(2, 4, 4))


def test_torch_accepts_these_lists_and_is_wrong():
    # What the checks are for: without them, the outputs change.
    model = ReluBeforeNorm().eval()
    fused = ao.fuse_modules(model, ["conv", "bn", "relu"])
    assert (fused(INPUT) - model(INPUT)).abs().max() > 0.1
