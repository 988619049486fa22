"""Batch norms that are not the plain kind keep what makes them different.

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
    NormAct,
    assert_fuses,
    assert_skipped,
    check,
    check_not_folded,
    trained,
)


def test_a_batch_norm_without_gamma_and_beta_is_folded_exactly_pt72049() -> None:
    assert_fuses(trained(ConvBn(bn=nn.BatchNorm2d(4, affine=False)), IMAGE), IMAGE)
    linear = ConvBn(nn.Linear(5, 3, bias=False), nn.BatchNorm1d(3, affine=False))
    assert_fuses(trained(linear, ROW), ROW)


def test_a_batch_norm_without_statistics_is_skipped() -> None:
    model = trained(ConvBn(bn=nn.BatchNorm2d(4, track_running_stats=False)), IMAGE)
    assert_skipped(model, IMAGE, because="statistics")


def test_a_batch_norm_in_training_mode_is_skipped() -> None:
    model = trained(ConvBn(), IMAGE)
    model.bn.train()
    before = model.bn.running_mean.clone()
    assert_skipped(model, IMAGE, because="training")
    assert torch.equal(model.bn.running_mean, before)


def test_a_whole_model_in_training_mode_is_skipped() -> None:
    model = trained(ConvBn(), IMAGE).train()
    plan = torchfuse.plan(model, IMAGE)
    assert plan.fusions == ()
    assert any("training" in skip.reason for skip in plan.skips)
    assert any("eval()" in skip.hint for skip in plan.skips)


def test_a_batch_norm_used_in_training_mode_by_its_owner_is_skipped() -> None:
    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return F.batch_norm(y, None, None, self.bn.weight, self.bn.bias, training=True)

    check_not_folded(Model())


def test_a_sync_batch_norm_in_eval_mode_stays_right() -> None:
    model = ConvBn(bn=nn.SyncBatchNorm(4)).eval()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2)
    check(model, IMAGE)


def test_a_batch_norm_subclass_keeps_its_activation() -> None:
    class BatchNormAct2d(nn.BatchNorm2d):
        def __init__(self, channels: int):
            super().__init__(channels)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x))

    result = check(trained(ConvBn(bn=BatchNormAct2d(4)), IMAGE), IMAGE)
    assert (result.model(IMAGE) >= 0).all()


def test_a_batch_norm_subclass_that_takes_more_arguments_stays_right() -> None:
    class Scaled(nn.BatchNorm2d):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x) * scale

    class Model(ConvBn):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x), scale=3.0)

    check(trained(Model(bn=Scaled(4)), IMAGE), IMAGE)


def test_a_conv_subclass_that_changes_its_output_is_skipped() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    check_not_folded(ConvBn(Scaled(4, 4, 3)))


def test_a_conv_subclass_that_standardises_its_weight_stays_right() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias)

    check(trained(ConvBn(Standardised(4, 4, 3)), IMAGE), IMAGE)


def test_a_conv_subclass_that_pads_first_stays_right() -> None:
    class SamePadded(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (1, 0, 1, 0)))

    check(trained(ConvBn(SamePadded(4, 4, 2)), IMAGE), IMAGE)


def test_a_batch_norm_with_a_forward_or_call_of_its_own_is_skipped() -> None:
    class Called(nn.BatchNorm2d):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 2

    patched = nn.BatchNorm2d(4)
    original = patched.forward
    patched.forward = lambda x: original(x) * 2  # type: ignore[method-assign]
    for norm in (Called(4), patched):
        assert_skipped(trained(ConvBn(None, norm), IMAGE), IMAGE, because="(of its own|forward)")


def test_a_subclass_that_normalises_by_itself_keeps_its_activation_timm() -> None:
    assert_fuses(trained(ConvBn(bn=NormAct()), IMAGE), IMAGE)


def test_a_subclass_that_calls_its_base_class_by_name_keeps_its_activation() -> None:
    class Named(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.silu(nn.BatchNorm2d.forward(self, x))

    assert_fuses(trained(ConvBn(bn=Named(4)), IMAGE), IMAGE)


def test_extra_state_of_a_batch_norm_is_not_lost() -> None:
    class WithState(nn.BatchNorm2d):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            assert state == {"version": 3}

    model = trained(ConvBn(bn=WithState(4)), IMAGE)
    result = assert_skipped(model, IMAGE, because="extra state")
    assert result.model.state_dict()["bn._extra_state"] == {"version": 3}
