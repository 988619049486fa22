"""One run shows one side of a branch: the other stays right."""

import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchfuse
from support.fusing_checks import IMAGE, ConvBn, assert_fuses, assert_skipped, check, trained


def test_a_data_dependent_branch_after_the_conv_is_skipped() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) if x.mean() > 0 else y

    model = trained(Model(), IMAGE)
    others = (IMAGE.abs() + 1, -IMAGE.abs() - 1)
    for inputs in others:  # planned on either side
        assert_skipped(model, inputs, because="(branch|bool|depend)", others=others)


def test_an_error_in_a_layer_that_is_made_on_the_fly_is_a_branch() -> None:
    class Model(ConvBn):
        def pooled(self, x: Tensor) -> Tensor | None:
            try:
                return nn.MaxPool2d(4)(x)  # type: ignore[no-any-return]
            except RuntimeError:  # the image is too small
                return None

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] != 4:
                raise ValueError(x.shape)
            pooled, y = self.pooled(x), self.conv(x)
            return y if pooled is None else self.bn(y) + pooled.mean()

    model = trained(Model(), IMAGE)
    assert_skipped(model, IMAGE, because="(branch|path)", others=(IMAGE[..., :3, :3],))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(4), partial(F.max_pool2d, kernel_size=4)])
def test_an_error_in_what_code_calls_is_a_branch_where_nothing_asks_for_sizes(pool: Any) -> None:
    def pooled(x: Tensor) -> Tensor:
        return pool(x)  # type: ignore[no-any-return]

    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            mean = self.mean(x)
            return y if mean is None else self.bn(y) + mean

        def mean(self, x: Tensor) -> Tensor | None:
            try:
                return pooled(x).mean()
            except RuntimeError:  # the image is too small
                return None

    model = trained(Model(), IMAGE)
    assert_skipped(model, IMAGE, because="path", others=(IMAGE[..., :3, :3],))


def test_an_operator_that_fails_raises_what_the_code_catches() -> None:
    def scaled(x: Tensor) -> Tensor:
        return x * 2

    class Falls(ConvBn):
        def __init__(self) -> None:
            super().__init__()
            self.settings = {"norm": True}

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = scaled(x)
            except RuntimeError:
                x = scaled(x.float())
            y = self.conv(x)
            return self.bn(y) if self.settings["norm"] else y

    class Leaves(Falls):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            try:
                x = scaled(x)
            except RuntimeError:
                return y
            return self.bn(y) + x

    assert_fuses(trained(Falls(), IMAGE), IMAGE)
    assert_skipped(trained(Leaves(), IMAGE), IMAGE, because="path")


def test_item_is_a_branch_too() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) if x.sum().item() > 0 else F.relu(y)

    others = (IMAGE.abs() + 1, -IMAGE.abs() - 1)
    for inputs in others:
        check(trained(Model(), IMAGE), inputs, others=others)


def test_a_shape_dependent_branch_is_skipped() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) if x.shape[-1] <= 8 else y

    others = (torch.randn(2, 4, 12, 12), torch.randn(2, 4, 5, 5))
    assert_skipped(trained(Model(), IMAGE), IMAGE, because="(shape|size|branch)", others=others)


@pytest.mark.parametrize(
    "condition",
    [
        lambda x: x.size(0) == 2,
        lambda x: len(x) == 2,
        lambda x: x.numel() == 512,
        lambda x: x.shape == (2, 4, 8, 8),
        lambda x: x.is_contiguous(),
        lambda x: bool((x > -50).all()),
        lambda x: int(x.abs().max()) < 5,
        lambda x: float(x[0, 0, 0, 0]) > -40,
        lambda x: torch.equal(x, x.clone()) and x.size(2) == 8,
        lambda x: x.max() in (x.max(),) and x.shape[3] == 8,
        lambda x: x.stride(0) == 256,
        lambda x: torch.is_tensor(x) and x.nelement() == 512,
    ],
)
def test_whatever_a_branch_asks_the_other_side_stays_right(condition: object) -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) if condition(x) else y

    others = (
        torch.randn(3, 4, 12, 8),
        torch.randn(3, 4, 8, 8),
        IMAGE - 100,
        IMAGE * 10,
        IMAGE.contiguous(memory_format=torch.channels_last),
        torch.randn(2, 4, 8, 9),
    )
    check(trained(Model(), IMAGE), IMAGE, others=others)


def test_a_branch_before_the_conv_does_not_hide_the_other_side() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            if x.mean() > 0:
                return self.bn(self.conv(x))
            return self.conv(x)

    others = (IMAGE.abs() + 1, -IMAGE.abs() - 1)
    for inputs in others:
        check(trained(Model(), IMAGE), inputs, others=others)


def test_a_caught_error_is_a_branch() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            try:
                x.view(2, 4, 64)
            except RuntimeError:
                return y
            return self.bn(y)

    check(trained(Model(), IMAGE), IMAGE, others=(torch.randn(3, 4, 8, 8), torch.randn(2, 4, 6, 6)))


def test_torch_where_stays_right() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.where(x.mean() > 0, self.bn(y), y)

    check(trained(Model(), IMAGE), IMAGE, others=(IMAGE.abs() + 1, -IMAGE.abs() - 1))


def test_a_branch_on_the_training_flag_stays_right_in_both_modes() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y if self.training else self.bn(y)

    model = trained(Model(), IMAGE)
    result = check(model, IMAGE)
    model.train()
    result.model.train()
    if result.plan.fusions:
        assert any("Evaluation mode" in sentence for sentence in result.plan.scope)
    else:
        torch.testing.assert_close(result.model(IMAGE), model(IMAGE))


def test_several_example_inputs_are_merged() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) if x.shape[-1] <= 8 else y

    model = trained(Model(), IMAGE)
    large = torch.randn(2, 4, 12, 12)
    result = torchfuse.fuse(model, [IMAGE, large])
    assert result.plan.fusions == ()
    torch.testing.assert_close(result.model(large), model(large))


def test_a_layer_that_only_one_case_reaches_stays_right() -> None:
    class Model(ConvBn):
        def __init__(self) -> None:
            super().__init__()
            self.conv2 = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor, deep: bool = False) -> Tensor:
            y = self.conv(x)
            return self.bn(self.conv2(y)) if deep else self.bn(y)

    model = trained(Model(), IMAGE)
    cases = [{"x": IMAGE}, {"x": IMAGE, "deep": True}]
    result = torchfuse.fuse(model, cases)
    for case in cases:
        torch.testing.assert_close(result.model(**case), model(**case))


def test_a_random_branch_stays_right() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) if torch.rand(()) < 0.5 else y

    model = trained(Model(), IMAGE)
    result = torchfuse.fuse(model, IMAGE)
    for seed in range(8):
        torch.manual_seed(seed)
        expected = model(IMAGE)
        torch.manual_seed(seed)
        torch.testing.assert_close(result.model(IMAGE), expected)


class ReadsTheWeightAsWell(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        z = self.bn(self.conv(x))
        return z * self.conv.weight.mean() if x.shape[0] == 5 else z


class BranchesOnInput(ConvBn):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as torch's own modules name it
        y = self.conv(input)
        return y if len(input) > 2 else self.bn(y)


class _Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = ConvBn()


class CallsTheConvAsWell(_Around):
    def forward(self, x: Tensor) -> Tensor:
        z = self.block(x)
        if x.shape[0] == 5:
            z = z + self.block.conv(x)
        return z


class ReadsTheInnerWeightAsWell(_Around):
    def forward(self, x: Tensor) -> Tensor:
        z = self.block(x)
        return z * self.block.conv.weight.mean() if x.mean() > 0.5 else z


class CallsTheNormAlone(_Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.block.bn(x) if x.mean() > 0.5 else self.block(x)


class _Head(nn.Module):
    def forward(self, z: Tensor, x: Tensor, block: nn.Module) -> Tensor:
        return z + block.conv(x) if x.shape[0] == 5 else z


class HandsTheBlockOn(_Around):
    def __init__(self) -> None:
        super().__init__()
        self.head = _Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x), x, self.block)


class PicksByItemUnderAnotherName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

    def forward(model, x: Tensor) -> Tensor:  # noqa: N805  # it may be called anything
        y = model.conv(x)
        return model.norms[int(x.mean() > 0.5)](y)


@pytest.mark.parametrize(
    "class_",
    [
        BranchesOnInput,
        ReadsTheWeightAsWell,
        CallsTheConvAsWell,
        ReadsTheInnerWeightAsWell,
        CallsTheNormAlone,
        HandsTheBlockOn,
        PicksByItemUnderAnotherName,
    ],
)
def test_a_use_on_the_other_side_of_a_branch_elsewhere_is_seen(class_: type[nn.Module]) -> None:
    others = (IMAGE + 2, torch.randn(5, 4, 8, 8))
    assert_skipped(trained(class_(), IMAGE), IMAGE, because="branch", others=others)


def test_a_method_that_norms_on_one_side_of_a_branch_only_stays_right() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear2, self.bn4 = nn.Linear(12, 12), nn.BatchNorm1d(8)
            self.linear6, self.norm = nn.Linear(12, 12), nn.LayerNorm(12)

        def forward(self, x: Tensor) -> Tensor:
            x3 = self.linear2(x)
            x5 = self.bn4(x3) if x.abs().max() < 3 else F.relu(x3)
            return self.norm(self.linear6(x5)) * 2

        def features_8(self, x: Tensor) -> Tensor:
            x3 = self.linear2(x)
            x5 = self.bn4(x3) if x.abs().max() < 3 else F.relu(x3)
            return self.norm(self.linear6(x5))

    rows = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    check(trained(Model(), rows), rows, others=(rows * 4,), methods=("features_8",))


class Conditioned(ConvBn):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.cond(x.sum() > 0, lambda t: self.bn(t), lambda t: t * 2, (y,))


def test_torch_cond_stays_right_and_runs_while_recorded() -> None:
    model = Conditioned().eval()
    with torch.no_grad():
        for inputs in (IMAGE.abs(), -IMAGE.abs()):
            result = torchfuse.fuse(model, inputs)
            assert result.plan.fusions == ()
            assert [skip.modules for skip in result.plan.skips] == [("bn",)]
            assert torch.equal(result.model(inputs), model(inputs))


def test_a_model_that_loads_the_compiler_while_it_is_recorded_is_recorded_again() -> None:
    code = """
import sys, torch, torchfuse
from torch import nn

class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t * 2, (self.bn(self.conv(x)),))

assert "torch._dynamo" not in sys.modules
model, x = Conditioned().eval(), torch.randn(2, 4, 5, 5)
print(len(torchfuse.fuse(model, x).plan.fusions))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
