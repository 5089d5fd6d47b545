"""A small part of what ``make attack`` does; see `scripts.attack`."""

import random
from pathlib import Path

import pytest

from scripts.attack.__main__ import PARTS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("part", "count"),
    [("operations", 2), ("signals", 2), ("crowds", 1), ("folders", 3), ("files", 12), ("layers", 150), ("models", 5)],
)
def test_nothing_is_found(part: str, count: int, tmp_path: Path) -> None:
    attack, _ = PARTS[part]
    assert attack(tmp_path, random.Random(1), count) == []
