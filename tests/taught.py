"""A tiny base that was taught something, for tests of what comes after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tunekit import adapters, export, families
from tunekit.adapters import Adapter
from tunekit.families import Family
from tunekit.recipe import Recipe
from tunekit.verification import Parity


def recipe_for(folder: Path, /, **sections: dict[str, Any]) -> Recipe:
    """Return a recipe for the base in `folder`; `sections` are laid over its own."""
    tree: dict[str, dict[str, Any]] = {
        "base": {"model": str(folder)},
        "data": {"source": str(folder), "trigger": "zorp", "class": "robot"},
        "adapter": {"kind": "lora", "rank": 4, "alpha": 6.0},
        "evaluate": {"steps": 3},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return Recipe.model_validate({"name": "zorp", **tree})


def verify(path: Path, recipe: Recipe, family: Family, adapter: Adapter) -> Parity:
    """Hold a file to what was taught, as an export does."""
    trained = export.measured(family, adapter, recipe)
    return export.check([path], recipe, trained, family.device, recipe.export.dtype)


def teach(recipe: Recipe, strength: float = 0.05) -> tuple[Family, Adapter]:
    """Return the base with an adapter whose every tensor holds random numbers, as if trained."""
    family = families.load(recipe.base)
    adapter = adapters.get(recipe.adapter.kind).attach(family, recipe.adapter, seed=1)
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapter.trained().values():
            parameter.add_(torch.randn(parameter.shape, generator=random) * strength)
    return family, adapter
