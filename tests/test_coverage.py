"""Every batch norm that can be folded is folded, and the outputs stay."""

import pytest

from support.coverage_of_model import coverage
from support.zoo import FAMILIES, HAND_WRITTEN, Entry


@pytest.mark.parametrize("entry", HAND_WRITTEN, ids=lambda entry: entry.name)
def test_hand_written_models_are_covered(entry: Entry) -> None:
    check(entry)


@pytest.mark.parametrize("entry", FAMILIES, ids=lambda entry: entry.name)
def test_transformers_families_are_covered(entry: Entry) -> None:
    pytest.importorskip("transformers")
    check(entry)


def check(entry: Entry) -> None:
    covered = coverage(entry)
    assert covered.expected > 0
    # Norms that are branches of their own follow no layer, and go where branches are merged.
    expected = covered.batch_norms if entry.name == "RepVGG" else covered.expected
    assert covered.fuse.norms == expected, covered.skips
    assert covered.fuse.agrees
