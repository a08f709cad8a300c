"""Tensors, adapters, bases and the folders of runs spoilt at random: read or refused."""

from __future__ import annotations

from random import Random

import pytest
from fuzzed import FEW, PLENTY, RANDOMS, Range, thorough
from hypothesis import given
from targets import Target
from targets_files import FILES

CHEAP = [target for target in FILES if not target.dear]
DEAR = [target for target in FILES if target.dear]


@pytest.fixture(scope="module", params=CHEAP, ids=lambda target: target.name)
def under_fire(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Range:
    """Return each reader in turn, with good inputs made."""
    target: Target = request.param
    return Range(target, tmp_path_factory.mktemp("fuzz"))


@thorough(PLENTY)
@given(rng=RANDOMS)
def test_whatever_comes_is_read_or_refused_in_a_line(under_fire: Range, rng: Random) -> None:
    under_fire.feed(rng)


@pytest.fixture(scope="module", params=DEAR, ids=lambda target: target.name)
def loading(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Range:
    """Return each reader in turn that takes long."""
    target: Target = request.param
    return Range(target, tmp_path_factory.mktemp("fuzz"))


@thorough(FEW)
@given(rng=RANDOMS)
def test_whatever_is_loaded_or_gone_on_with_fits_or_is_refused(loading: Range, rng: Random) -> None:
    loading.feed(rng)
