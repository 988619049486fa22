"""What a whole model costs, counted by hand."""

import torch
from torch import nn

import torchfuse
from torchfuse.planning import WholeCost


def test_a_convolution_a_norm_and_an_activation_in_place_are_counted() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(8 * 16, 5),
    ).eval()  # fmt: skip
    plan = torchfuse.plan(model, torch.rand(1, 3, 4, 4))
    image, hidden = 3 * 16, 8 * 16
    assert plan.whole == WholeCost(
        macs=hidden * 3 * 9 + hidden + hidden * 5,
        # conv, norm, activation and linear; the view moves nothing
        traffic_bytes=4 * ((image + hidden) + 2 * hidden + 2 * hidden + (hidden + 5)),
        norms=1,
        norms_merged=1,
    )
    (fusion,) = plan.fusions
    assert fusion.macs_saved == hidden
    assert fusion.traffic_saved_bytes == 4 * 2 * hidden


def test_a_norm_that_is_skipped_is_counted_and_not_merged() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    whole = torchfuse.plan(model, torch.rand(1, 3, 4, 4)).whole
    assert whole is not None
    assert (whole.norms, whole.norms_merged) == (2, 1)


def test_a_program_costs_what_its_module_does() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    x = torch.rand(1, 3, 6, 6)
    program = torch.export.export(model, (x,))
    assert (
        torchfuse.fuse_exported(program, verify=False).plan.whole == torchfuse.plan(model, x).whole
    )


class RepVgg(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + self.norm(x)


def test_norms_that_go_into_the_layers_beside_or_after_them_are_merged() -> None:
    model = nn.Sequential(RepVgg(), nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)).eval()
    x = torch.rand(1, 3, 6, 6)
    whole = torchfuse.plan(model, x).whole
    assert whole is not None
    assert (whole.norms, whole.norms_merged) == (2, 1)  # the last one stays in a module
    whole = torchfuse.fuse_exported(torch.export.export(model, (x,))).plan.whole
    assert whole is not None
    assert (whole.norms, whole.norms_merged) == (2, 2)
