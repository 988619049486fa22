"""Two layers in a row become one, where that takes fewer multiply-adds."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from support.rewriting_checks import Model, calls, fused, reasons

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
        "patches": nn.Conv2d(4, 16, (3, 2), (3, 2)),
        "embed": nn.Linear(16, 12),
        "mixed": nn.Conv1d(16, 4, 1, groups=2, bias=False),
        "last": nn.Conv2d(4, 16, (9, 8)),
        "only": nn.Linear(4, 1),
        "channels": nn.Conv2d(32, 6, 1),
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


# What is left of two layers with something between
BETWEEN: dict[str, tuple[dict[str, int], Callable[[Model, Tensor], object]]] = {
    "a view": ({"linear": 1, "view": 1}, lambda m, x: m.down(m.up(x).view(-1, 32))),
    "a view of what is left": ({"linear": 1, "view": 1}, lambda m, x: m.down(m.up(x).view(72, -1))),
    "a reshape": ({"linear": 1, "reshape": 1}, lambda m, x: m.down(m.up(x).reshape(2, 36, 32))),
    "flattening": ({"linear": 1, "flatten": 1}, lambda m, x: m.down(m.up(x).flatten(1, 2))),
    "unsqueezing": ({"linear": 1, "unsqueeze": 1}, lambda m, x: m.down(m.up(x).unsqueeze(1))),
    "squeezing": ({"slice": 1, "linear": 1, "squeeze": 1},
        lambda m, x: m.down(m.up(x[:, :1]).squeeze(1))),
    "unflattening": ({"linear": 1, "unflatten": 1},
        lambda m, x: m.down(m.up(x).unflatten(2, (3, 3)))),
    "unflattening the channels": ({"linear": 1, "unflatten": 1},
        lambda m, x: m.down(m.up(x).unflatten(-1, (1, 32)))),
    "a transpose": ({"linear": 1, "transpose": 1}, lambda m, x: m.down(m.up(x).transpose(1, 2))),
    "several": ({"linear": 1, "view": 1, "unsqueeze": 1},
        lambda m, x: m.down(m.up(x).view(-1, 32).unsqueeze(0))),
    "an affine too": ({"linear": 1, "view": 1},
        lambda m, x: m.down((2 * m.up(x) - 1).view(-1, 32) / 3)),
    "places in a row, and groups": ({"conv2d": 1, "view": 1},
        lambda m, x: m.mixed(m.patches(x).view(2, 16, 12))),
    "channels moved to the front": ({"linear": 1, "permute": 1},
        lambda m, x: m.channels(m.up(x).permute(0, 3, 1, 2))),
    "the one place that is left": ({"conv2d": 1, "flatten": 1},
        lambda m, x: m.embed(m.last(x).flatten(1))),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_layers_with_a_move_between_become_one(name: str) -> None:
    left, body = BETWEEN[name]
    result = fused(body, X, **layers())
    assert calls(result) == left, result.plan


def test_a_view_of_declared_sizes_is_kept_between() -> None:
    sizes = ({0: Dim("batch", max=8), 2: Dim("height", min=2, max=64)},)
    result = fused(
        lambda m, x: m.down(m.up(x).view(x.shape[0], 4 * x.shape[2], 32)),
        X,
        dynamic=sizes,
        **layers(),
    )
    assert calls(result)["linear"] == 1
    assert result.model.module()(torch.randn(3, 4, 5, 8)).shape == (3, 20, 8)


def test_what_reads_the_result_finds_it_in_memory_as_it_was() -> None:
    for move in (lambda y: y.transpose(1, 2), lambda y: y.permute(1, 2, 0, 3)):
        result = fused(
            lambda m, x, move=move: F.relu(m.down(move(m.up(x)))).view(-1), X, **layers()
        )
        assert calls(result)["linear"] == 1


def two_readers(m: Model, x: Tensor) -> object:
    y = m.up(x).view(-1, 32)
    return m.down(y), F.relu(y)


STAYS: dict[str, tuple[str, Callable[[Model, Tensor], object]]] = {
    "a bottleneck": ("Merged, it would take", lambda m, x: m.wide(m.narrow(F.relu(m.wide(x))))),
    "depthwise and pointwise": ("Merged, it would take", lambda m, x: m.pw(m.dw(x))),
    "a bias before padding": ("The first convolution has a bias", lambda m, x: m.padded(m.wide(x))),
    "padding between": (
        "The second convolution pads what the first one gives.",
        lambda m, x: m.padded(m.from3(x)),
    ),
    "a view that divides the features": ("", lambda m, x: m.embed(m.up(x).view(-1, 16))),
    "a view that moves the features": ("", lambda m, x: m.down(m.up(x).view(2, 4, 32, 9).mT)),
    "a view that others read": ("", two_readers),
    "a view like another": ("", lambda m, x: m.down(m.up(x).view_as(m.up(x) * 2))),
    "a k×k one after tokens": (
        "",
        lambda m, x: m.from3(m.down(m.up(x)).permute(0, 1, 3, 2)),
    ),
    "a bottleneck with a view between": (
        "Merged, it would take",
        lambda m, x: m.up(m.down(F.relu(m.up(x))).view(-1, 8)),
    ),
    "patches made tokens": (
        "Merged, the result would lie in memory in another order.",
        lambda m, x: m.embed(m.patches(x).flatten(2).transpose(1, 2)),
    ),
    "an activation between": ("", lambda m, x: m.narrow(F.relu(m.wide(x)))),
}


@pytest.mark.parametrize("name", STAYS)
def test_it_stays(name: str) -> None:
    reason, body = STAYS[name]
    result = fused(body, X, "layer_chain", **layers())
    assert reason in reasons(result)
    left = calls(result)
    assert left.get("conv2d", 0) + left.get("linear", 0) >= 2
