from pathlib import Path

import pytest

import torchfuse
from support.fusing_checks import IMAGE, ConvBn, trained
from torchfuse import rules
from torchfuse.errors import InputError

FILES = sorted(
    path.stem for path in Path(rules.__file__).parent.glob("*.py") if not path.stem.startswith("_")
)


def test_every_file_of_rules_is_in_the_tuple_and_named_like_its_rule():
    assert sorted(rule.name for rule in rules.RULES) == FILES


@pytest.mark.parametrize("name", FILES)
def test_every_rule_has_a_test_file(name):
    assert (Path(__file__).parent / f"test_{name}.py").is_file()


@pytest.mark.parametrize("name", ["conv_bm", "conv_relu"])
def test_an_unknown_rule_is_an_error_that_lists_the_rules(name):
    with pytest.raises(InputError, match=rf"no rule '{name}'; the rules are conv_bn, "):
        torchfuse.plan(trained(ConvBn(), IMAGE), IMAGE, rules=[name])


def test_only_rules_that_are_asked_for_are_used():
    model = trained(ConvBn(), IMAGE)
    (skip,) = torchfuse.plan(model, IMAGE, rules=["linear_bn"]).skips
    assert skip.reason == "The rule conv_bn, which is about it, was not asked for."
    assert len(torchfuse.plan(model, IMAGE, rules=["conv_bn"]).fusions) == 1
