"""Two layers in a row become one, where that takes fewer multiply-adds."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriting_checks import Model, calls, fused, reasons

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

X = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0))


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {
        "wide": nn.Conv2d(4, 16, 1),
        "wide_plain": nn.Conv2d(4, 16, 1, bias=False),
        "narrow": nn.Conv2d(16, 4, 1),
        "valid": nn.Conv2d(16, 4, 3),
        "padded": nn.Conv2d(16, 4, 3, 2, 1),
        "from3": nn.Conv2d(4, 16, 3, 2, 1),
        "dw": nn.Conv2d(4, 4, 3, padding=1, groups=4),
        "dw2": nn.Conv2d(4, 4, 1, groups=4),
        "pw": nn.Conv2d(4, 4, 1),
        "up": nn.Linear(8, 32),
        "down": nn.Linear(32, 8, bias=False),
    }


MERGES: dict[str, tuple[str, Callable[[Model, Tensor], object]]] = {
    "linear layers": ("linear", lambda m, x: m.down(m.up(x))),
    "1×1 and 1×1": ("conv2d", lambda m, x: m.narrow(m.wide(x))),
    "1×1 and k×k without padding": ("conv2d", lambda m, x: m.valid(m.wide(x))),
    "1×1 without bias and k×k with padding": ("conv2d", lambda m, x: m.padded(m.wide_plain(x))),
    "k×k and 1×1": ("conv2d", lambda m, x: m.narrow(m.from3(x))),
    "depthwise and depthwise": ("conv2d", lambda m, x: m.dw2(m.dw(x))),
    "three": ("conv2d", lambda m, x: m.narrow(m.wide(m.pw(x)))),
    "matrices": ("linear", lambda m, x: x @ m.up.weight.t() @ m.down.weight.t()),
}


@pytest.mark.parametrize("name", MERGES)
def test_it_becomes_one(name: str) -> None:
    layer, body = MERGES[name]
    result = fused(body, X, **layers())
    assert calls(result) == {layer: 1}, result.plan


STAYS: dict[str, tuple[str, Callable[[Model, Tensor], object]]] = {
    "a bottleneck": ("Merged, it would take", lambda m, x: m.wide(m.narrow(F.relu(m.wide(x))))),
    "depthwise and pointwise": ("Merged, it would take", lambda m, x: m.pw(m.dw(x))),
    "a bias before padding": ("The first convolution has a bias", lambda m, x: m.padded(m.wide(x))),
    "padding between": (
        "The second convolution pads what the first one gives.",
        lambda m, x: m.padded(m.from3(x)),
    ),
    "an activation between": ("", lambda m, x: m.narrow(F.relu(m.wide(x)))),
}


@pytest.mark.parametrize("name", STAYS)
def test_it_stays(name: str) -> None:
    reason, body = STAYS[name]
    result = fused(body, X, "layer_chain", **layers())
    assert reason in reasons(result)
    assert calls(result).get("conv2d", 0) >= 2
