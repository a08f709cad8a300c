"""Judges of the real classes with random weights, and an individual for them to judge."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny import tiny_tokenizer
from transformers import CLIPConfig, CLIPModel, ResNetConfig, ResNetModel

from tunekit.toybox import world

ZORP = world.Individual(
    "robot", "purple", "yellow", "stripes", 1.1, 1.15, (90, 30, 140), (250, 210, 60)
)
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
