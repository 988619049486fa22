"""What is split into branches, chains and affines is merged again, and exactly the same."""

from random import Random

import pytest
import torch

from support.unmerged_networks import judged, unmerged

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


@pytest.mark.parametrize("seed", range(12))
def test_an_unmerged_network_is_merged_again_bit_for_bit(seed: int) -> None:
    drawn = unmerged(Random(seed), seed)
    _, problems = judged(drawn)
    assert problems == [], drawn.source


def test_equal_seeds_draw_equal_networks() -> None:
    first, second = unmerged(Random(5), 5), unmerged(Random(5), 5)
    assert first.source == second.source
    assert torch.equal(first.model(first.inputs), second.model(second.inputs))
