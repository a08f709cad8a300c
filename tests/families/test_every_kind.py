"""What no other test holds to every family: DoRA, half precision, text encoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from taught import recipe_for, teach

from tunekit import families
from tunekit.checkpoint import read_safetensors
from tunekit.export import export_adapter
from tunekit.recipe import Recipe

KINDS: dict[str, dict[str, Any]] = {
    "DoRA": {"kind": "lora", "rank": 2, "dora": True, "targets": "full", "text_encoder": True},
    "LoRA": {"kind": "lora", "rank": 2, "rslora": True, "alpha": 3.0, "text_encoder": True},
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", families.names())
def test_it_is_exported_in_half_precision_with_text_encoders(
    name: str, kind: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Verified on the way: loaded, every weight changed as trained, predicting the same."""
    tree = recipe_for(tiny_folder(name), export={"dtype": "fp16"}).model_dump()
    recipe = Recipe.model_validate(tree | {"adapter": KINDS[kind]})
    files = {file.layout: file for file in export_adapter(*teach(recipe, 0.02), recipe, tmp_path)}
    assert files["diffusers"].diffusers
    assert {*files} == ({"diffusers"} if kind == "DoRA" else {"diffusers", "kohya"})
    for layout, file in files.items():
        assert file.parity.error < 2e-3
        tensors, _ = read_safetensors(file.path)
        beginning = "lora_te" if layout == "kohya" else "text_encoder"
        assert any(key.startswith(beginning) for key in tensors)
        assert any(".text_model." in key or "_text_model_" in key for key in tensors)
