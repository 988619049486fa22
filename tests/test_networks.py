"""The random networks are reproducible, and contain what can go wrong."""

from random import Random

import pytest
import torch

from support.networks import network


@pytest.mark.parametrize("seed", range(20))
def test_equal_seeds_draw_equal_networks(seed: int) -> None:
    first, second = network(Random(seed), seed), network(Random(seed), seed)
    assert first.source == second.source
    with torch.no_grad():
        outputs = first.model(first.inputs(0)), second.model(second.inputs(0))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_random_networks_contain_what_can_go_wrong() -> None:
    source = "".join(network(Random(seed), seed).source for seed in range(150))
    for part in (
        "ConvTranspose", "groups=", "BatchNorm3d", "BatchNorm1d", "SyncBatchNorm", "BatchNormAct2d",
        "affine=False", "track_running_stats=False", "F.batch_norm(", "F.conv2d(", "F.linear(",
        "ParametrizedConv", ".item()", ".shape[-1] <=", "torch.cat(", ".chunk(", "self.kept",
        "def features_", "bfloat16", "transpose(1, 2)", "inplace=True", "Dropout", "weight.mean()",
        "class Block", "for layer in self.layers", "[-1](",
    ):  # fmt: skip
        assert part in source, part


@pytest.mark.parametrize("seed", range(20))
def test_in_float64_a_network_computes_the_same_without_rounding(seed: int) -> None:
    drawn = network(Random(seed), seed)
    wide = drawn.in_float64()
    tensors = [*wide.model.parameters(), *wide.model.buffers()]
    assert not {t.dtype for t in tensors} & {torch.float32, torch.bfloat16}
    with torch.no_grad():
        outputs = drawn.model(drawn.inputs(0)), wide.model(wide.inputs(0))
    first, second = (o[0] if isinstance(o, tuple) else o for o in outputs)
    assert second.dtype == torch.float64
    torch.testing.assert_close(first, second, check_dtype=False, rtol=0.1, atol=0.1)
