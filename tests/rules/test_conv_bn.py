"""conv → batch norm: what fuses, and what is skipped."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchfuse
from support.fusing_checks import ConvBn, assert_fuses_in_both_hosts, assert_skipped, trained

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def images(dims, dtype=torch.float32):
    return torch.randn(2, 4, *[6] * dims, generator=torch.Generator().manual_seed(dims)).to(dtype)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_fuses_over_bias_groups_affine_and_dimensions(dims, bias, groups, affine):
    torch.manual_seed(0)
    conv = CONVS[dims](4, 8, 3, bias=bias, groups=groups)
    model = trained(ConvBn(conv, NORMS[dims](8, affine=affine)), images(dims))
    assert_fuses_in_both_hosts(model, images(dims))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_fuses_in_every_dtype(dtype):
    torch.manual_seed(0)
    model = trained(ConvBn(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)), images(2)).to(dtype)
    assert_fuses_in_both_hosts(model, images(2, dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"dilation": 2},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular"},
    ],
)
def test_fuses_over_strides_and_paddings(options):
    torch.manual_seed(0)
    assert_fuses_in_both_hosts(trained(ConvBn(nn.Conv2d(4, 4, 3, **options)), images(2)), images(2))


class Between(ConvBn):
    """Something between the conv and the batch norm."""

    def __init__(self, between):
        super().__init__(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.between = between

    def forward(self, x):
        return self.bn(self.between(self.conv(x)))


class Permuted(nn.Module):
    def forward(self, y):
        return y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


class Cropped(nn.Module):
    def forward(self, y):
        return y[:, :, 1:-1, ::2]


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout(), Permuted(), Cropped()])
def test_looks_through_what_only_moves_elements(between):
    torch.manual_seed(0)
    model = trained(Between(between), images(2))
    assert_fuses_in_both_hosts(model, images(2))


def test_looks_through_a_flatten_that_keeps_the_channels():
    class Flat(ConvBn):
        def forward(self, x):
            return self.bn(self.conv(x).flatten(2))

    torch.manual_seed(0)
    assert_fuses_in_both_hosts(
        trained(Flat(nn.Conv2d(4, 4, 3), nn.BatchNorm1d(4)), images(2)), images(2)
    )


def test_a_block_called_twice_is_folded_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = ConvBn()

        def forward(self, x):
            return self.block(F.relu(self.block(x)))

    torch.manual_seed(0)
    assert_fuses_in_both_hosts(trained(Twice(), images(2)), images(2))


class Padded(nn.Module):
    def forward(self, y):
        return F.pad(y, (1, 1, 1, 1))


class Shuffled(nn.Module):
    def forward(self, y):
        return y.flip(1)


class Turned(nn.Module):
    def forward(self, y):
        return y.transpose(1, 2)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (nn.ReLU(), "comes from relu"),
        (Padded(), "comes from pad"),
        (nn.AvgPool2d(2), "comes from avg_pool2d"),
        (Shuffled(), "comes from flip"),
    ],
)
def test_skipped_where_something_else_lies_between(between, reason):
    torch.manual_seed(0)
    assert_skipped(trained(Between(between), images(2)), images(2), because=reason)


def test_skipped_where_another_axis_is_normalised():
    torch.manual_seed(0)
    model = trained(Between(Turned()), images(2))  # 4 channels, 4 rows
    assert_skipped(model, images(2), because="not the channels of `conv` in their order")


def test_skipped_where_the_dropout_between_is_active():
    torch.manual_seed(0)
    model = trained(Between(nn.Dropout()), images(2))
    model.between.train()
    (skip,) = torchfuse.plan(model, images(2)).skips
    assert "comes from dropout" in skip.reason or "training mode" in skip.reason


def test_a_subclass_that_adds_to_a_batch_norm_keeps_what_it_adds():
    class Clipped(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).clamp(0, 6)

    torch.manual_seed(0)
    model = trained(ConvBn(bn=Clipped(4)), images(2))
    result = assert_fuses_in_both_hosts(model, images(2))
    assert isinstance(result.model.bn, Clipped)
    assert list(result.model.state_dict()) == ["conv.weight", "conv.bias"]


def test_the_parameters_saved_count_an_added_bias():
    torch.manual_seed(0)
    with_bias = assert_fuses_in_both_hosts(
        trained(ConvBn(nn.Conv2d(4, 4, 3)), images(2)), images(2)
    )
    without = assert_fuses_in_both_hosts(
        trained(ConvBn(nn.Conv2d(4, 4, 3, bias=False)), images(2)), images(2)
    )
    assert with_bias.plan.fusions[0].parameters_saved == 8
    assert without.plan.fusions[0].parameters_saved == 4
    assert with_bias.plan.fusions[0].macs_saved == 2 * 4 * 4 * 4
    assert with_bias.plan.fusions[0].traffic_saved_bytes == 2 * 4 * (2 * 4 * 4 * 4)


class ReadsItsBias(nn.Conv2d):
    def forward(self, x):
        return super().forward(x - self.bias.mean())


class IgnoresItsBias(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight)


class ScalesItsBias(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias * 0.5)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (ReadsItsBias, "weight or bias of `conv` is also read by another use: mean"),
        (IgnoresItsBias, "does not pass its bias on as it is"),
        (ScalesItsBias, "does not pass its bias on as it is"),
    ],
)
def test_skipped_where_a_subclass_does_something_else_with_its_bias(conv, reason):
    torch.manual_seed(0)
    assert_skipped(trained(ConvBn(conv(4, 4, 3)), images(2)), images(2), because=reason)


def test_skipped_where_the_batch_norm_is_held_elsewhere_too():
    class Model(ConvBn):
        def __init__(self, hold):
            super().__init__()
            self.held = hold(self.bn)

        def forward(self, x):
            return self.bn(self.conv(x))

    for hold in (lambda bn: {"a": [bn]}, lambda bn: bn.forward, lambda bn: lambda x, bn=bn: bn(x)):
        torch.manual_seed(0)
        model = Model(hold).eval()
        (skip,) = torchfuse.plan(model, images(2)).skips
        assert "also held by the plain attribute `held`" in skip.reason


def test_skipped_where_a_reshape_keeps_the_channels_only_at_one_size():
    class Model(ConvBn):
        def forward(self, x):
            return self.bn(self.conv(x).reshape(-1, 4))

    pixels = torch.randn(3, 4, 1, 1)
    model = Model(nn.Conv2d(4, 4, 1), nn.BatchNorm1d(4)).eval()
    (skip,) = torchfuse.plan(model, pixels).skips
    assert "not the channels of `conv` in their order, moved by" in skip.reason
