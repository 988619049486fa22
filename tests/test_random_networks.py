"""Fusing a random network changes none of its outputs, and nothing that was not asked for."""

from random import Random

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from support.judge import problems
from support.networks import network


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],  # which takes minutes, and only where one is wrong
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.randoms(use_true_random=False), st.integers(0, 2**16))
def test_a_fused_random_network_computes_what_it_computed(random: Random, seed: int) -> None:
    drawn = network(random, seed)
    assert problems(drawn) == [], drawn.source
