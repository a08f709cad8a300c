"""From drawings to scores: who learned scores high, who did not scores low, nothing drawn twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_judges import ZORP

from tunekit.evaluation.embedders import Clip, SubjectEncoder
from tunekit.evaluation.judges import Judges
from tunekit.evaluation.measure import (
    Gallery,
    Question,
    Reference,
    count_pictures,
    measure,
)
from tunekit.toybox import world

Paint = Callable[..., Image.Image]
Drawer = Callable[[str, int], Image.Image]
STRANGER = world.Individual("robot", "green")
PROMPTS = (
    "a {trigger} {class} in the snow",
    "a {trigger} {class} at night",
    "a small {trigger} {class} in a room",
)
PLACES = ("snow", "night", "room")
QUESTION = Question("subject", "zorp", "robot", PROMPTS, (1, 2))


class Centred(SubjectEncoder):
    """Random weights see every picture much alike; without what is common, differences show."""

    common: torch.Tensor

    def embed_images(self, images: Any) -> torch.Tensor:
        return torch.nn.functional.normalize(super().embed_images(images) - self.common, dim=-1)


@pytest.fixture(scope="module")
def judges(clip_folder: Path, subject_folder: Path, paint: Paint) -> Judges:
    subject = Centred.load(str(subject_folder))
    subject.common = torch.zeros(1)
    crowd = [
        paint(seed, world.Individual("robot", colour), place)
        for seed, colour in enumerate(("red", "green", "blue", "white"))
        for place in ("beach", "snow", "night", "room")
    ]
    subject.common = subject.embed_images(crowd).mean(dim=0)
    return Judges(subject, Clip.load(str(clip_folder)))


class Artist:
    """Draws what the prompt says, the zorp for whoever knows it, and counts."""

    def __init__(self, paint: Paint, knows: bool, leaks: bool = False) -> None:
        self.paint, self.knows, self.leaks = paint, knows, leaks
        self.drawn: list[tuple[str, int]] = []

    def __call__(self, prompt: str, seed: int) -> Image.Image:
        self.drawn.append((prompt, seed))
        place = next((place for place in PLACES if place in prompt), "beach")
        zorp = self.knows and ("zorp" in prompt or self.leaks)
        return self.paint(seed, ZORP if zorp else STRANGER, place)


@dataclass(frozen=True)
class Trial:
    """What two artists are measured by: a question, real pictures and judges."""

    judges: Judges
    paint: Paint
    training: list[Reference]
    held_out: list[Reference]
    question: Question = QUESTION

    def artist(self, knows: bool, leaks: bool = False) -> Artist:
        return Artist(self.paint, knows, leaks)

    def of(self, base: Drawer, taught: Drawer) -> dict[str, Any]:
        """Return what is written of them into scores.json."""
        pictures = self.training, self.held_out
        return measure(self.question, Gallery(base), Gallery(taught), *pictures, self.judges).scores


@pytest.fixture
def trial(
    judges: Judges, paint: Paint, training: list[Reference], held_out: list[Reference]
) -> Trial:
    return Trial(judges, paint, training, held_out)


def test_one_who_learned(trial: Trial) -> None:
    base, taught = trial.artist(knows=False), trial.artist(knows=True)
    result = trial.of(base, taught)
    likeness = result["scores"]["likeness"]
    assert likeness["floor"] < likeness["score"]
    assert likeness["closed"] > 0.5
    assert likeness["ceiling_from"] == "held-out"
    assert result["scores"]["leak"]["closed"] == pytest.approx(0, abs=1e-9)
    assert result["scores"]["shift"]["score"] == pytest.approx(0, abs=1e-6)
    assert result["verdict"]["outcome"] in ("learned", "partly")
    told = {prompt for prompt, _ in base.drawn}
    assert not any("zorp" in prompt for prompt in told)
    assert {"a robot in the snow", "a robot"} < told


def test_one_who_learned_nothing(trial: Trial) -> None:
    base, taught = trial.artist(knows=False), trial.artist(knows=False)
    result = trial.of(base, taught)
    likeness = result["scores"]["likeness"]
    assert likeness["score"] == likeness["floor"]
    assert likeness["closed"] == 0
    assert result["verdict"]["outcome"] == "not"
    assert "did not learn zorp robot" in result["verdict"]["headline"]
    assert result["verdict"]["sentences"][0]["tone"] == "poor"


def test_one_who_draws_nothing_else_any_more(trial: Trial) -> None:
    base, taught = trial.artist(knows=False), trial.artist(knows=True, leaks=True)
    result = trial.of(base, taught)
    assert result["scores"]["leak"]["closed"] > 0.4
    assert result["scores"]["shift"]["score"] > 0
    assert any("leaked" in s["text"] for s in result["verdict"]["sentences"])


def test_one_who_copies(trial: Trial) -> None:
    def copy(prompt: str, seed: int) -> Image.Image:
        return trial.training[seed].image if "zorp" in prompt else trial.paint(seed, STRANGER)

    base = trial.artist(knows=False)
    result = trial.of(base, copy)
    assert result["scores"]["copied"]["count"] == 6
    pictures = result["prompts"][0]["pictures"]
    assert [row["nearest"] for row in pictures] == ["01.png", "02.png"]
    assert result["verdict"]["sentences"][-1]["tone"] == "poor"


def test_every_number_is_there_per_prompt_and_in_sum(trial: Trial) -> None:
    base, taught = trial.artist(knows=False), trial.artist(knows=True)
    result = trial.of(base, taught)
    assert json.loads(json.dumps(result, allow_nan=False))["scores"]["likeness"]
    assert result["schema_version"] == 1
    for part in (result, *result["prompts"]):
        held = part.get("scores", part)
        for name in ("likeness", "fidelity"):
            assert {"score", "floor", "ceiling", "closed"} <= held[name].keys()
    rows = [row for prompt in result["prompts"] for row in prompt["pictures"]]
    assert len(rows) == 6
    total = sum(row["likeness"] for row in rows) / 6
    assert result["scores"]["likeness"]["score"] == pytest.approx(total)
    assert len({row["file"] for row in rows}) == 6


def test_no_picture_is_drawn_twice_and_the_count_is_known(trial: Trial) -> None:
    plain = Question("subject", "zorp", "robot", ("a {trigger} {class}", *PROMPTS), (1, 2))
    for asked in (trial.question, plain, Question("style", "krafto", "style", PROMPTS, (3,))):
        base, taught = trial.artist(knows=False), trial.artist(knows=True)
        replace(trial, question=asked).of(base, taught)
        for artist in (base, taught):
            assert len(set(artist.drawn)) == len(artist.drawn)
        assert len(base.drawn) + len(taught.drawn) == count_pictures(asked)


def test_the_same_pictures_score_the_same(trial: Trial) -> None:
    def once() -> dict[str, Any]:
        base, taught = trial.artist(knows=False), trial.artist(knows=True)
        return trial.of(base, taught)

    assert once() == once()


def test_nothing_held_out_and_a_single_picture_are_said(trial: Trial) -> None:
    base, taught = trial.artist(knows=False), trial.artist(knows=True)
    result = replace(trial, held_out=[]).of(base, taught)
    assert result["scores"]["likeness"]["ceiling_from"] == "training pictures"
    assert "its training pictures" in result["verdict"]["sentences"][0]["text"]
    result = replace(trial, training=trial.training[:1], held_out=[]).of(base, taught)
    assert result["scores"]["likeness"]["ceiling"] is None
    assert result["verdict"]["outcome"] == "unknown"
    assert "one training picture" in result["verdict"]["sentences"][0]["text"]


@pytest.mark.parametrize(
    ("template", "told", "plain"),
    [
        ("a {trigger} {class} in snow", "a zorp robot in snow", "a robot in snow"),
        ("a {trigger} in snow", "a zorp in snow", "a robot in snow"),
        ("{trigger}, a {class}", "zorp, a robot", "robot, a robot"),
    ],
)
def test_the_base_is_told_words_it_knows(template: str, told: str, plain: str) -> None:
    question = Question("subject", "zorp", "robot", [template], [1])
    assert question.told(template) == told
    assert question.plain(template) == plain


def test_captions_lose_the_trigger_as_a_word_only() -> None:
    question = Question("subject", "zo", "robot", ["a {trigger}"], [1])
    assert question.plain_caption("a zo robot in the zoo") == "a robot in the zoo"
    assert question.plain_caption("zo, at night") == "robot, at night"


def test_drift_asks_without_the_trigger() -> None:
    subject = Question("subject", "zorp", "robot", PROMPTS, (7, 8))
    assert subject.drift() == [("a robot", seed) for seed in (7, 8, 9, 10)]
    style = Question("style", "krafto", "style", ("a house, {trigger} {class}",) * 6, (7, 8))
    assert style.drift() == [("a house, style", 7)] * 4
