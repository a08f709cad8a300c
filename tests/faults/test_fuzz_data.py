"""Recipes, metadata, captions, shards, tables and pictures spoilt at random: read or refused."""

from __future__ import annotations

from random import Random

import pytest
from fuzzed import PLENTY, RANDOMS, Range, thorough
from hypothesis import given
from targets import DATA, Target


@pytest.fixture(scope="module", params=DATA, ids=lambda target: target.name)
def under_fire(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Range:
    """Return each reader in turn, with good inputs made."""
    target: Target = request.param
    return Range(target, tmp_path_factory.mktemp("fuzz"))


@thorough(PLENTY)
@given(rng=RANDOMS)
def test_whatever_comes_is_read_or_refused_in_a_line(under_fire: Range, rng: Random) -> None:
    under_fire.feed(rng)
