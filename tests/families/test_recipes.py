"""The recipes for bases that are downloaded: valid, and what they say when the base is not here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import tunekit
from tunekit import families
from tunekit.errors import UserError
from tunekit.progress import Silent
from tunekit.recipe import load_recipe
from tunekit.schema import LAYOUTS

ROOT = Path(__file__).parent.parent.parent
# Recipe -> the family it is for, and that family's usual resolution.
RECIPES = {
    "sd15-character-lora": ("sd", 512),
    "sdxl-character-lora": ("sdxl", 1024),
    "sd35-character-lora": ("sd3", 1024),
    "flux-character-lora": ("flux", 1024),
}


def path_of(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.yaml"


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_valid_and_for_its_family(name: str) -> None:
    recipe = load_recipe(path_of(name))
    assert (recipe.base.family, recipe.data.resolution) == RECIPES[name]
    assert recipe.name == name


@pytest.mark.parametrize("name", RECIPES)
def test_without_the_base_one_line_says_which_and_how_to_get_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(path_of(name))
    with pytest.raises(UserError) as caught:
        tunekit.train(recipe, out=tmp_path / "run", reporter=Silent())
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"base.model: there is no folder {recipe.base.model} here")
    assert f"`hf download {recipe.base.model}`" in line
    assert not (tmp_path / "run").exists()


def test_a_vae_of_the_hub_is_refused_with_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(path_of("sdxl-character-lora"), ["base.vae=someone/better-vae"])
    assert 'base.vae: there is no folder or file "someone/better-vae"' in str(caught.value)
    assert "`hf download someone/better-vae --local-dir FOLDER`" in str(caught.value)
    (tmp_path / "vae").mkdir()
    recipe = load_recipe(path_of("sdxl-character-lora"), [f"base.vae={tmp_path / 'vae'}"])
    assert recipe.base.vae == str(tmp_path / "vae")


@pytest.mark.parametrize("name", RECIPES)
def test_its_settings_teach_together(
    name: str,
    tiny_folder: Callable[..., Path],
    judges: dict[str, str],
    run_cache: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a tiny base of that family: fewer and smaller steps, all else as it stands."""
    monkeypatch.chdir(ROOT)
    family, _ = RECIPES[name]
    small = [
        f"base.model={tiny_folder(family)}",
        "base.variant=null",
        "data.resolution=32",
        f"data.buckets.step={families.get(family).size_multiple}",
        "train.steps=2",
        "train.warmup_steps=1",
        "train.learning_rate=1e-2",
        "train.sample_every=0",
        "train.checkpoint_every=0",
        "export.dtype=fp32",
        "evaluate.steps=1",
        "evaluate.seeds=[1]",
        'evaluate.prompts=["a {trigger} {class}"]',
        *(f"evaluate.{key}={value}" for key, value in judges.items()),
    ]
    run = tunekit.train(path_of(name), small, out=tmp_path / "run", reporter=Silent())
    assert [file.layout for file in run.files] == [*LAYOUTS]
    assert not any(file.parity.error > 0.1 for file in run.files)
