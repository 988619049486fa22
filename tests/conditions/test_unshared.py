"""What else uses a layer: its calls must always be followed by the batch norm."""

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

import torchfuse
from support.fusing_checks import IMAGE, ConvBn, assert_fuses, trained

APART = "`conv` is called more than once, and not always right before `bn`."


class AloneAfterwards(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv(x)


class AloneBefore(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(self.conv(x)) + y


class AloneInABranch(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y + self.conv(x[:1]).mean() if x.shape[0] > 1 else y


class ByAFunction(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight, padding=1)


class AsAPenalty(ConvBn):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.bn(self.conv(x)), self.conv.weight.square().sum()


class AsAnOutput(ConvBn):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.bn(self.conv(x)), self.conv.weight


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (AloneAfterwards(), APART),
        (AloneBefore(), APART),
        (AloneInABranch(), APART),
        (ByAFunction(), "The weight of `conv` is also read by another use: conv2d."),
        (AsAPenalty(), "The weight of `conv` is also read by another use: square."),
        (AsAnOutput(), "The weight of `conv` is also read by output (output)."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_layer_that_is_used_without_its_norm_is_skipped(model: nn.Module, reason: str) -> None:
    plan = torchfuse.plan(trained(model, IMAGE), IMAGE)
    assert plan.fusions == ()
    assert [skip.reason for skip in plan.skips if skip.rule != "branches"] == [reason]


def test_a_layer_whose_every_call_is_followed_by_its_norm_is_fused() -> None:
    class Twice(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) + self.bn(self.conv(x + 1))

    assert_fuses(trained(Twice(), IMAGE), IMAGE)


def test_a_layer_whose_spectral_norm_was_never_called_yet_is_fused() -> None:
    model = trained(ConvBn(), IMAGE)
    nn.utils.spectral_norm(model.conv)  # until the first call, `weight` is `weight_orig`'s memory
    assert_fuses(model, IMAGE)


def test_another_use_is_told_to_read_the_norm_and_an_output_of_the_model_is_not() -> None:
    class ByAnotherUse(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) + y.relu()

    class AsTheOutput(ConvBn):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return self.bn(y), y

    said = [
        torchfuse.plan(trained(model, IMAGE), IMAGE) for model in (ByAnotherUse(), AsTheOutput())
    ]
    assert [(skip.reason, skip.hint) for plan in said for skip in plan.skips] == [
        (
            "The output of `conv` is also read by another use: relu.",
            "Let the other use read the batch norm's output.",
        ),
        ("The output of `conv` is also an output of the model.", ""),
    ]
