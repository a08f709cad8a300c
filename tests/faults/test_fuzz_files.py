"""Tensors, adapters, bases and the folders of runs spoilt at random: read or refused."""

from __future__ import annotations

from random import Random

from fuzzed import FEW, PLENTY, RANDOMS, Range, each, thorough
from hypothesis import given
from targets_files import FILES

under_fire = each([target for target in FILES if not target.dear])
loading = each([target for target in FILES if target.dear])


@thorough(PLENTY)
@given(rng=RANDOMS)
def test_whatever_comes_is_read_or_refused_in_a_line(under_fire: Range, rng: Random) -> None:
    under_fire.feed(rng)


@thorough(FEW)
@given(rng=RANDOMS)
def test_whatever_is_loaded_or_gone_on_with_fits_or_is_refused(loading: Range, rng: Random) -> None:
    loading.feed(rng)
