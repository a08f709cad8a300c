"""Tiny judges, and pictures drawn by the pocket world."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_judges import EDGE, ZORP, tiny_clip, tiny_resnet

from tunekit.evaluation.measure import Reference
from tunekit.toybox import world


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny CLIP."""
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def subject_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny subject encoder."""
    return tiny_resnet(tmp_path_factory.mktemp("subject"))


@pytest.fixture(scope="session")
def paint() -> Callable[..., Image.Image]:
    """Return paint(seed, who=ZORP, place, style): the individual in a pose of the seed."""

    @cache
    def draw(
        seed: int,
        who: world.Individual = ZORP,
        place: str = "beach",
        style: str = "flat",
        size: int = EDGE,
    ) -> Image.Image:
        figure = world.sample_pose(np.random.default_rng(seed), who, world.FULL, dressed=0.0)
        return world.render(world.Scene((figure,), place, style, seed), size)

    return draw


@pytest.fixture(scope="session")
def training(paint: Callable[..., Image.Image]) -> list[Reference]:
    """Return six training pictures of the individual."""
    places = ("beach", "forest", "city")
    return [
        Reference(
            f"{i:02d}.png", paint(i, place=places[i % 3]), f"a zorp robot in the {places[i % 3]}"
        )
        for i in range(6)
    ]


@pytest.fixture(scope="session")
def held_out(paint: Callable[..., Image.Image]) -> list[Reference]:
    """Return three held-out pictures of the individual."""
    places = ("snow", "night", "room")
    return [
        Reference(f"h{i}.png", paint(50 + i, place=place), f"a zorp robot in the {place}")
        for i, place in enumerate(places)
    ]
