"""A module or tensor used more than once is not edited for one of its uses.

The numbers are upstream issues: pt is pytorch/pytorch, ao pytorch/ao.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchfuse
from support.fusing_checks import (
    IMAGE,
    ROW,
    ConvBn,
    assert_fuses,
    assert_skipped,
    check,
    trained,
)


def test_a_conv_called_twice_is_skipped_pt104593() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.bn(self.conv(x)))

    assert_skipped(
        trained(Model(), IMAGE), IMAGE, because="conv.*(twice|2 times|more than once|again)"
    )


def test_a_conv_called_twice_with_a_batch_norm_each_is_skipped() -> None:
    class Model(ConvBn):
        def __init__(self) -> None:
            super().__init__()
            self.bn2 = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn2(self.conv(self.bn(self.conv(x))))

    assert_skipped(trained(Model(), IMAGE), IMAGE, because="(twice|2 times|more than once|again)")


def test_a_batch_norm_called_after_two_convs_stays_right() -> None:
    class Model(ConvBn):
        def __init__(self) -> None:
            super().__init__()
            self.conv2 = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv2(self.bn(self.conv(x))))

    check(trained(Model(), IMAGE), IMAGE)


def test_a_batch_norm_called_after_a_conv_and_alone_is_skipped() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.bn(self.conv(x)) + 1)

    assert_skipped(trained(Model(), IMAGE), IMAGE, because="(twice|2 times|more than once|again)")


def test_one_module_under_two_names_is_one_module() -> None:
    class Model(ConvBn):
        def __init__(self) -> None:
            super().__init__()
            self.alias = self.conv

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(self.bn(self.conv(x)))

    assert_skipped(trained(Model(), IMAGE), IMAGE, because="(twice|2 times|more than once|again)")


def test_two_convs_tied_to_one_weight_are_skipped_pt197539() -> None:
    class Model(ConvBn):
        def __init__(self) -> None:
            super().__init__()
            self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
            self.conv2.weight = self.conv.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.conv2(self.bn(self.conv(x)))

    assert_skipped(trained(Model(), IMAGE), IMAGE, because="weight.*(shared|tied|also|other)")


def test_a_weight_tied_transposed_is_skipped() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(5, 3)
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.bn(self.encode(x)), self.encode.weight.t())

    assert_skipped(trained(Model(), ROW), ROW, because="weight.*(shared|tied|also|other)")


def test_a_parameter_that_is_a_view_of_the_weight_is_skipped() -> None:
    class Model(ConvBn):
        def __init__(self) -> None:
            super().__init__()
            self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
            self.conv2.weight = nn.Parameter(self.conv.weight.data.transpose(0, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv2(self.bn(self.conv(x)))

    model = trained(Model(), IMAGE)
    result = assert_skipped(model, IMAGE, because="(shared|tied|also|other|storage|memory)")
    weights = result.model.conv.weight, result.model.conv2.weight
    assert weights[0].untyped_storage().data_ptr() == weights[1].untyped_storage().data_ptr()


def test_a_weight_read_as_a_value_is_skipped() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) + self.conv.weight.mean()

    assert_skipped(trained(Model(), IMAGE), IMAGE, because="weight.*(shared|tied|also|other|read)")


def test_a_bias_read_as_a_value_is_skipped() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) * self.conv.bias.view(1, -1, 1, 1)

    assert_skipped(trained(Model(), IMAGE), IMAGE, because="(shared|tied|also|other|read)")


def test_statistics_read_as_values_are_skipped() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) + self.bn.running_mean.sum()

    assert_skipped(trained(Model(), IMAGE), IMAGE, because="(shared|tied|also|other|read)")


def test_statistics_shared_with_another_batch_norm_stay_right() -> None:
    class Model(ConvBn):
        def __init__(self) -> None:
            super().__init__()
            self.alone = nn.BatchNorm2d(4)
            self.alone.running_mean = self.bn.running_mean
            self.alone.weight = self.bn.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.alone(self.bn(self.conv(x)) + x)

    model = trained(Model(), IMAGE)
    result = check(model, IMAGE)
    assert result.model.alone.running_mean is not None


def test_parameters_that_lie_in_one_vector_are_not_tied() -> None:
    model = nn.Sequential(ConvBn(), ConvBn())
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector, model.parameters())
    assert_fuses(trained(model, IMAGE), IMAGE, times=2)


def test_a_view_of_the_whole_vector_reads_every_parameter_in_it() -> None:
    class Penalised(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            whole = torch.empty(0).set_(self.bn.bias.detach().untyped_storage())
            return self.bn(self.conv(x)) + whole.mean()

    model = Penalised()
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector, model.parameters())
    (skip,) = torchfuse.plan(trained(model, IMAGE), IMAGE).skips
    assert "a view of several parameters" in skip.reason
