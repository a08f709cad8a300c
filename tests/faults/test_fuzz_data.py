"""Recipes, metadata, captions, shards, tables and pictures spoilt at random: read or refused."""

from __future__ import annotations

from random import Random

from fuzzed import PLENTY, RANDOMS, Range, each, thorough
from hypothesis import given
from targets import DATA

under_fire = each(DATA)


@thorough(PLENTY)
@given(rng=RANDOMS)
def test_whatever_comes_is_read_or_refused_in_a_line(under_fire: Range, rng: Random) -> None:
    under_fire.feed(rng)
