"""A recipe that is right, where it stands, and the faults of others that stand there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunekit.recipe import RecipeError, load_recipe

_TEXT = """\
name: good
base:
  model: {model}
data:
  source: pictures
  trigger: zorp
  class: robot
adapter:
  kind: lora
train:
  learning_rate: 1e-4
"""


def recipe_for(model: str) -> str:
    """Return its text, of 11 lines; the pictures are in the folder of that name."""
    return _TEXT.format(model=model)


GOOD = recipe_for("model")


def fill(folder: Path) -> Path:
    """Fill a folder with what the good recipe needs: pictures, a base and itself; return it."""
    for name in ("pictures", "more", "model/unet", "recipes"):
        (folder / name).mkdir(parents=True)
    parts = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "scheduler": "DDIMScheduler",
    }
    index = {"_class_name": "StableDiffusionPipeline"} | {k: ["x", v] for k, v in parts.items()}
    (folder / "model/model_index.json").write_text(json.dumps(index))
    (folder / "model/unet/config.json").write_text(json.dumps({"in_channels": 4}))
    (folder / "recipes/good.yaml").write_text(GOOD)
    return folder


def faults(text: str, *overrides: str) -> list[str]:
    """Return the lines with which a recipe of this text is refused, in such a folder."""
    Path("recipes/bad.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("recipes/bad.yaml"), overrides)
    assert [str(fault) for fault in caught.value.faults] == str(caught.value).splitlines()
    return str(caught.value).splitlines()
