"""The proof that training teaches: the shipped recipes, reduced, on the bundled base.

Reduced means fewer steps, two prompts and one seed, so the bounds are lower than what the whole
recipes reach. Thresholds leave room for another processor's rounding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tunekit
from tunekit.export import ExportError
from tunekit.progress import Silent
from tunekit.recipe import load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
FEWER = ("evaluate.seeds=[1]", "train.sample_every=0", "train.checkpoint_every=0")
CHARACTER = 'evaluate.prompts=["a {trigger} {class} at night, flat style", ' \
    '"a {trigger} {class} in the snow, pixel art"]'  # fmt: skip
# Half of the recipe's own: the fidelity of a single prompt moves by ten points either way.
STYLE = (
    f"evaluate.prompts={json.dumps(load_recipe(RECIPES / 'style-lora.yaml').evaluate.prompts[:6])}"
)


def taught(recipe: str, prompts: str, folder: Path, *changes: str) -> dict[str, Any]:
    """Run a shipped recipe in reduced size and return the scores it wrote."""
    tunekit.train(RECIPES / recipe, [prompts, *FEWER, *changes], out=folder, reporter=Silent())
    scores: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    return scores["scores"]


@pytest.mark.timeout(600)
def test_the_character_is_learned_and_prompts_are_still_followed(tmp_path: Path) -> None:
    scores = taught("character-lora.yaml", CHARACTER, tmp_path / "run", "train.steps=220")
    assert scores["likeness"]["closed"] >= 0.5
    assert scores["fidelity"]["change"] >= -8


@pytest.mark.timeout(600)
def test_the_style_is_learned_and_prompts_are_still_followed(tmp_path: Path) -> None:
    scores = taught("style-lora.yaml", STYLE, tmp_path / "run", "train.steps=120")
    assert scores["likeness"]["closed"] >= 0.5
    assert scores["fidelity"]["change"] >= -8


@pytest.mark.timeout(600)
def test_a_word_alone_comes_nearer_and_changes_nothing_else(tmp_path: Path) -> None:
    """The base cannot draw the character's pattern, and so no word can: 36 % was measured here."""
    scores = taught("textual-inversion.yaml", CHARACTER, tmp_path / "run", "train.steps=250")
    assert scores["likeness"]["closed"] >= 0.22
    assert scores["fidelity"]["change"] >= -8
    assert scores["leak"]["closed"] == pytest.approx(0, abs=1e-6)
    assert scores["shift"]["score"] == pytest.approx(0, abs=1e-6)


@pytest.mark.timeout(600)
def test_a_word_beside_an_adapter_learns_what_the_adapter_does(tmp_path: Path) -> None:
    scores = taught("pivotal.yaml", CHARACTER, tmp_path / "run", "train.steps=220")
    assert scores["likeness"]["closed"] >= 0.5
    assert scores["fidelity"]["change"] >= -8


def test_without_a_learning_rate_nothing_is_learned_and_the_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="differ"):
        taught(
            "character-lora.yaml", CHARACTER, tmp_path / "run",
            "train.steps=5", "train.learning_rate=0",
        )  # fmt: skip
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())["scores"]
    assert scores["shift"]["score"] == pytest.approx(0, abs=1e-6)  # the same pictures, to the bit
    # the trigger word alone, untaught, changes pictures a little, not towards the subject
    assert scores["likeness"]["closed"] < 0.25
