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
from tunekit.data import open_rgb
from tunekit.evaluation import scores as measured
from tunekit.evaluation.embedders import SubjectEncoder
from tunekit.evaluation.measure import picture_name
from tunekit.export import ExportError
from tunekit.progress import Silent
from tunekit.recipe import load_recipe

# Pictures and what the base draws of the class are kept for this session, not in the user's cache.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("run_cache")]

RECIPES = Path(__file__).parent.parent / "recipes"
FEWER = ("evaluate.seeds=[1]", "train.sample_every=0", "train.checkpoint_every=0")
CHARACTER = 'evaluate.prompts=["a {trigger} {class} at night, flat style", ' \
    '"a {trigger} {class} in the snow, pixel art"]'  # fmt: skip
WORD = 'evaluate.prompts=["a big {trigger} {class} in the snow, flat style", ' \
    '"a {trigger} {class} in the snow, watercolour"]'  # fmt: skip
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
@pytest.mark.parametrize(
    ("recipe", "steps", "least"),
    [
        ("character-dora.yaml", 100, 0.4),  # here 58 %
        ("character-loha.yaml", 100, 0.35),  # 53 %
        ("character-lokr.yaml", 150, 0.27),  # 38 %
        ("character-oft.yaml", 100, 0.3),  # 45 %
        ("character-boft.yaml", 100, 0.28),  # 40 %
        ("qlora-nf4.yaml", 150, 0.45),  # 74 %
    ],
)
def test_every_kind_learns_the_character(
    recipe: str, steps: int, least: float, tmp_path: Path
) -> None:
    """With a fifth of the pictures of the whole recipes; an untaught trigger is below 25 %."""
    fewer = (f"train.steps={steps}", "train.batch_size=2", "evaluate.steps=10")
    scores = taught(recipe, CHARACTER, tmp_path / "run", *fewer)
    assert scores["likeness"]["closed"] >= least
    assert scores["fidelity"]["change"] >= -8


def class_diversity(run: Path) -> float:
    """Return the diversity of "a robot" as a run drew it without the trigger: share of the base's.

    From four seeds; the comparison of methods takes 24.
    """
    encoder = SubjectEncoder.load("toybox")
    after, before = (
        encoder.embed_images(
            [open_rgb(run / "samples" / picture_name(who, "a robot", seed)) for seed in range(1, 5)]
        )
        for who in ("taught", "base")
    )
    found = measured.diversity(after, before)
    assert found is not None
    return found


@pytest.mark.timeout(600)
def test_pictures_of_the_class_keep_it_diverse(tmp_path: Path) -> None:
    """DreamBooth without `data.prior`: every robot becomes the one. With it, robots stay robots.

    Measured: likeness 67 % without and 42 % with as few pictures of the class as here, and of
    "a robot" 82 % and 30 %.
    """
    plain = ("data.trigger=zorp", "tokens=[]")  # a word of its own would keep the two apart better
    pace = ("train.batch_size=4", "train.learning_rate=5e-4")
    fewer = ("train.steps=120", "evaluate.steps=10", *pace, *plain)
    few = ("data.prior.count=18", "data.prior.steps=10", "data.prior.weight=0.5")
    kept = taught("dreambooth-full.yaml", CHARACTER, tmp_path / "kept", *fewer, *few)
    lost = taught("dreambooth-full.yaml", CHARACTER, tmp_path / "lost", *fewer, "data.prior=null")
    assert lost["likeness"]["closed"] >= 0.5
    assert kept["likeness"]["closed"] >= 0.28
    assert lost["leak"]["closed"] - kept["leak"]["closed"] >= 0.4
    assert class_diversity(tmp_path / "kept") >= class_diversity(tmp_path / "lost") + 0.2


@pytest.mark.timeout(600)
def test_the_style_is_learned_and_prompts_are_still_followed(tmp_path: Path) -> None:
    scores = taught("style-lora.yaml", STYLE, tmp_path / "run", "train.steps=120")
    assert scores["likeness"]["closed"] >= 0.5
    assert scores["fidelity"]["change"] >= -8


@pytest.mark.timeout(600)
def test_a_word_alone_comes_nearer_and_changes_nothing_else(tmp_path: Path) -> None:
    """48 % was measured here. A word takes its time: in 250 steps some prompts gain nothing yet."""
    scores = taught("textual-inversion.yaml", WORD, tmp_path / "run", "train.steps=300")
    assert scores["likeness"]["closed"] >= 0.3
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
