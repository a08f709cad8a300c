"""Adapter files for tests of the tools: of every kind, and as other trainers write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from taught import recipe_for, teach
from torch import Tensor

from tunekit import families
from tunekit.checkpoint import write_safetensors
from tunekit.export import export_adapter
from tunekit.families import Family
from tunekit.loading import load_file
from tunekit.recipe import Recipe
from tunekit.schema import Base

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"kind": "lora", "rank": 4, "alpha": 3.0, "targets": "full", "text_encoder": True},
    "DoRA": {"kind": "lora", "rank": 4, "targets": "full", "dora": True, "text_encoder": True},
    "LoHa": {"kind": "loha", "rank": 4, "alpha": 2.0, "targets": "full", "text_encoder": True},
    "LoKr": {"kind": "lokr", "rank": 2, "alpha": 3.0, "targets": "full", "factor": 4},
    "OFT": {"kind": "oft", "block_size": 4, "targets": "full", "text_encoder": True},
    "BOFT": {"kind": "boft", "block_size": 4, "targets": "full"},
    "whole": {"kind": "full", "text_encoder": True},
}
PLACES = {
    "denoiser": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "mid_block.resnets.0.conv1",
        "up_blocks.0.upsamplers.0.conv",
    ),
    # all four of an attention, or diffusers takes none of them from kohya's naming
    "text_encoder": (
        *(f"encoder.layers.0.self_attn.{p}_proj" for p in ("q", "k", "v", "out")),
        "encoder.layers.1.mlp.fc1",
    ),
}


def export(base: Path, kind: str, out: Path, dtype: str = "fp32") -> dict[str, Path]:
    """Return files of a taught adapter by layout."""
    tree = recipe_for(base, export={"dtype": dtype}).model_dump()
    recipe = Recipe.model_validate(tree | {"adapter": KINDS[kind]})
    return {f.layout: f.path for f in export_adapter(*teach(recipe, 0.02), recipe, out)}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def shapes(family: Family) -> dict[tuple[str, str], tuple[int, ...]]:
    """Return the weights' shapes of the modules that the files below change."""
    return {
        (component, name): tuple(family.component(component).get_submodule(name).weight.shape)
        for component, names in PLACES.items()
        for name in names
    }


def low_rank(shape: tuple[int, ...], seed: int, rank: int = 3) -> tuple[Tensor, Tensor]:
    """Return down and up for a weight."""
    down = random(rank, *shape[1:], seed=seed)
    return down, random(shape[0], rank, *[1] * (len(shape) - 2), seed=seed + 1)


def matrix(down: Tensor, up: Tensor) -> Tensor:
    """Return what they multiply to, reckoned here and not by the package: float64."""
    flat = up.double().flatten(1) @ down.double().flatten(1)
    return flat.reshape(len(up), *down.shape[1:])


def changes(path: Path, base: Path, dtype: str = "fp32") -> dict[str, Tensor]:
    """Return what a file does to each weight of a fresh base, through the client's own loader."""
    family = families.load(Base(model=str(base), dtype=dtype))
    loaded = load_file(family, path, "judged")
    return {name: change() for name, change in loaded.changes.items()}


def write(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    write_safetensors(path, tensors, metadata)
    return path


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the worst module's distance as a share of its change."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    return max(
        float((other[n].double() - one[n].double()).norm() / one[n].double().norm()) for n in one
    )
