"""Fusing a random network changes none of its outputs, and nothing that was not asked for."""

from random import Random

import pytest

from judging import problems
from networks import network

# The first of the benchmark's networks, the same in every run.
SEEDS = 200


@pytest.mark.parametrize("start", range(0, SEEDS, 20))
def test_a_fused_random_network_computes_what_it_computed(start: int) -> None:
    for seed in range(start, start + 20):
        drawn = network(Random(seed), seed)
        assert problems(drawn) == [], drawn.source
