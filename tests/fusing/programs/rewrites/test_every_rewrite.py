"""Every file of rewrites/ is in the tuple, is named like its rule, and has a test file."""

from pathlib import Path

import pytest

from torchfuse.fusing.programs import rewrites
from torchfuse.rules import RULES

FILES = sorted(
    path.stem
    for path in Path(rewrites.__file__).parent.glob("*.py")
    if not path.stem.startswith("_")
)


def test_every_file_is_in_the_tuple_and_named_like_its_rule() -> None:
    assert sorted(rule.name for rule in rewrites.REWRITES) == FILES


def test_no_two_rules_have_one_name() -> None:
    assert not {rule.name for rule in RULES} & set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_rewrite_has_a_test_file(name: str) -> None:
    assert (Path(__file__).parent / f"test_{name}.py").is_file()
