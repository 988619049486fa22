"""Weights that are computed from others stay right."""

import pytest
from torch import nn
from torch.nn.utils import parametrizations

from fusing_checks import IMAGE, ConvBn, check, trained


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrized_conv_stays_right(wrap: object) -> None:
    check(trained(ConvBn(wrap(nn.Conv2d(4, 4, 3))), IMAGE), IMAGE)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_conv_with_the_old_weight_norm_or_spectral_norm_stays_right(wrap: object) -> None:
    # The old ones recompute the weight in a pre-hook: a folded weight would be overwritten.
    check(trained(ConvBn(wrap(nn.Conv2d(4, 4, 3))), IMAGE), IMAGE)
