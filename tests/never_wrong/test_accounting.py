"""Nothing is dropped in silence."""

import torch.nn.functional as F
from torch import Tensor, nn

import torchfuse
from support.fusing_checks import IMAGE, ConvBn, trained


def test_every_batch_norm_is_either_fused_or_skipped_with_a_reason_and_what_to_change() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.BatchNorm2d(4)
            self.block = ConvBn()
            self.alone = nn.BatchNorm2d(4)
            self.shared = ConvBn()

        def forward(self, x: Tensor) -> Tensor:
            x = self.block(self.first(x))
            x = self.alone(F.relu(x))
            y = self.shared.conv(x)
            return self.shared.bn(y) + y

    plan = torchfuse.plan(trained(Model(), IMAGE), IMAGE)
    named = {name for entry in (*plan.fusions, *plan.skips) for name in entry.modules}
    assert {"first", "block.bn", "alone", "shared.bn"} <= named
    for skip in plan.skips:
        assert skip.reason[0].isupper() or skip.reason[0] in "`'\""
        assert skip.reason.endswith(".")
    assert plan.scope
