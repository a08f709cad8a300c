"""What each layout carries of each kind: written, or refused when the recipe is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunekit import adapters
from tunekit.recipe import RecipeError, recipe_from
from tunekit.schema import LAYOUTS

# kind and settings -> the layouts that carry it. Whatever is not here is refused.
CARRIES: list[tuple[dict[str, Any], set[str]]] = [
    ({"kind": "lora"}, {"diffusers", "kohya"}),
    ({"kind": "lora", "rslora": True}, {"diffusers", "kohya"}),
    ({"kind": "lora", "init": "pissa"}, {"diffusers", "kohya"}),
    ({"kind": "lora", "text_encoder": True}, {"diffusers", "kohya"}),
    ({"kind": "lora", "dora": True}, {"diffusers"}),
    ({"kind": "lora", "dora": True, "text_encoder": True}, {"diffusers"}),
    ({"kind": "loha"}, {"kohya"}),
    ({"kind": "loha", "text_encoder": True}, {"kohya"}),
    ({"kind": "lokr"}, {"kohya"}),
    ({"kind": "lokr", "text_encoder": True}, {"kohya"}),
    ({"kind": "oft"}, {"kohya"}),
    ({"kind": "oft", "text_encoder": True}, {"kohya"}),
    ({"kind": "boft"}, {"kohya"}),
    ({"kind": "full"}, {"kohya"}),
    ({"kind": "full", "text_encoder": True}, {"kohya"}),
]
PAIRS = [
    pytest.param(
        adapter, layout, layout in able, id=f"{'-'.join(map(str, adapter.values()))}-{layout}"
    )
    for adapter, able in CARRIES
    for layout in LAYOUTS
]


def told(tmp_path: Path, adapter: dict[str, Any], layouts: list[str] | None) -> dict[str, Any]:
    return {
        "name": "zorp",
        "base": {"model": "toybox"},
        "data": {"source": str(tmp_path), "trigger": "zorp", "class": "robot"},
        "adapter": adapter,
        "export": {"layouts": layouts},
    }


def test_every_kind_is_in_the_table() -> None:
    assert {adapter["kind"] for adapter, _ in CARRIES} == {*adapters.names()}


@pytest.mark.parametrize(("adapter", "layout", "carried"), PAIRS)
def test_one_layout(adapter: dict[str, Any], layout: str, carried: bool, tmp_path: Path) -> None:
    """Nothing is loaded: `tunekit validate` says the same."""
    if carried:
        recipe = recipe_from(told(tmp_path, adapter, [layout]))
        assert recipe.adapter is not None
        assert recipe.adapter.layouts(recipe.export.layouts) == (layout,)
        return
    (other,) = {*LAYOUTS} - {layout}
    with pytest.raises(RecipeError, match=rf"export\.layouts: .*use {other}"):
        recipe_from(told(tmp_path, adapter, [layout]))


@pytest.mark.parametrize(("adapter", "able"), CARRIES)
def test_by_default_every_one_that_can(
    adapter: dict[str, Any], able: set[str], tmp_path: Path
) -> None:
    recipe = recipe_from(told(tmp_path, adapter, None))
    assert recipe.adapter is not None
    assert {*recipe.adapter.layouts(recipe.export.layouts)} == able


def test_words_have_a_file_of_their_own_and_no_layout(tmp_path: Path) -> None:
    tree = told(tmp_path, {"kind": "lora"}, ["kohya"]) | {"tokens": [{"name": "<zorp>"}]}
    tree["data"]["trigger"] = "<zorp>"
    assert recipe_from(tree).export.layouts == ("kohya",)
    del tree["adapter"]
    with pytest.raises(RecipeError, match=r"export\.layouts: says how"):
        recipe_from(tree)
