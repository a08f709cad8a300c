"""Judges of the real classes with random weights, and pictures drawn by the pocket world."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, ResNetConfig, ResNetModel

from tests.tiny import tiny_tokenizer
from tunekit.evaluation.measure import Reference
from tunekit.toybox import world

EDGE = 32
PREPROCESSING = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}


def tiny_clip(folder: Path) -> Path:
    """Save a CLIP of 32-pixel pictures with its tokenizer."""
    tokenizer = tiny_tokenizer(max_length=24)
    tower = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "max_position_embeddings": 24,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **tower,
        },
        vision_config={"image_size": EDGE, "patch_size": 8, "hidden_size": 32, **tower},
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": EDGE, "width": EDGE}
    crop = {"size": {"shortest_edge": EDGE}, "crop_size": size, "do_center_crop": True}
    write_preprocessing(folder, **crop)
    return folder


def tiny_resnet(folder: Path) -> Path:
    """Save a convolutional encoder of 32-pixel pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"
        )
        ResNetModel(config).save_pretrained(folder)
    write_preprocessing(folder, size={"height": EDGE, "width": EDGE})
    return folder


def write_preprocessing(folder: Path, **changes: object) -> None:
    """Write a preprocessor_config.json with some keys changed."""
    text = json.dumps({**PREPROCESSING, **changes})
    (folder / "preprocessor_config.json").write_text(text)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny CLIP."""
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def subject_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny subject encoder."""
    return tiny_resnet(tmp_path_factory.mktemp("subject"))


ZORP = world.Individual(
    "robot", "purple", "yellow", "stripes", 1.1, 1.15, (90, 30, 140), (250, 210, 60)
)


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
