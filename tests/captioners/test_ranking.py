from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_judges import tiny_clip

from tunekit import captioners
from tunekit.captioners import Wishes, _phrases
from tunekit.errors import UserError
from tunekit.toybox import world

PICTURES = 200
# Of the pictures, by what is named.
AT_LEAST = {"subject": 0.85, "colour": 0.85, "place": 0.85, "style": 0.85}


def load(wishes: Wishes | None = None, **options: Any) -> Any:
    kind = captioners.get("ranking")
    return kind.load(kind.Options(**options), wishes or Wishes(), torch.device("cpu"))


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    rng = np.random.default_rng(20261120)
    return [world.sample_scene(rng, pairs=0.0) for _ in range(PICTURES)]


def test_the_toybox_names_subject_colour_place_and_style(scenes: list[world.Scene]) -> None:
    ranking = load()
    told = {words[0]: place for place, words in world.PLACE_WORDS.items()}
    told |= {words[0]: style for style, words in world.STYLE_WORDS.items()}
    right = dict.fromkeys(AT_LEAST, 0)
    for scene in scenes:
        chosen = ranking.choose(world.render(scene))
        for slot, truth in zip(AT_LEAST, scene.attributes(), strict=True):
            right[slot] += told.get(chosen[slot], chosen[slot]) == truth
    shares = {slot: count / PICTURES for slot, count in right.items()}
    assert all(shares[slot] >= least for slot, least in AT_LEAST.items()), shares


def test_a_class_noun_stands_for_what_the_subject_is_like(scenes: list[world.Scene]) -> None:
    ranking = load(Wishes(class_noun="robot"))
    for scene in scenes[:5]:
        text = ranking.describe(world.render(scene)).text
        assert text.startswith("a robot ")
        assert not any(colour in text for colour in world.FULL.colours)
        assert world.PLACE_WORDS[scene.place][0] in text


def test_the_same_picture_gets_the_same_words(scenes: list[world.Scene]) -> None:
    pictures = [world.render(scene) for scene in scenes[:4]]
    forth, back = load(), load()
    told = [forth.describe(picture).text for picture in pictures]
    assert [back.describe(picture).text for picture in reversed(pictures)] == told[::-1]


def test_the_bundled_clip_says_that_it_knows_its_own_world_only() -> None:
    assert "for photographs name another CLIP" in load().notes[0]


def test_any_clip_ranks_any_phrases(tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path / "clip")
    (tmp_path / "phrases.yaml").write_text(
        'form: "a {thing} {place}"\nsubject: thing\nthing: [cat, dog]\nplace: ["", at night]\n'
    )
    book = {"clip": str(clip), "phrases": str(tmp_path / "phrases.yaml")}
    ranking = load(**book)
    assert not ranking.notes
    text = ranking.describe(Image.new("RGB", (40, 30), "red")).text
    assert text in {"a cat", "a dog", "a cat at night", "a dog at night"}
    # The caption is the nearest of all that can be said.
    ways = ["a cat", "a dog", "a cat at night", "a dog at night"]
    picture = ranking.clip.embed_images([Image.new("RGB", (40, 30), "red")])[0]
    assert ways[int((ranking.clip.embed_texts(ways) @ picture).argmax())] == text


def test_phrases_longer_than_the_clip_reads_are_refused(tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path / "clip")
    with pytest.raises(UserError, match="are longer than the 24 tokens"):
        load(clip=str(clip))


def test_an_article_fits_and_empty_phrases_leave_no_gap() -> None:
    book = _phrases.PhraseBook("a {colour} {thing} {place}, {light}", {})
    chosen = {"colour": "orange", "thing": "cat", "place": "", "light": ""}
    assert book.caption(chosen) == "an orange cat"
    assert book.caption({**chosen, "colour": "", "light": "at night"}) == "a cat, at night"


def test_the_general_lists_hold_each_phrase_once() -> None:
    book = _phrases.general()
    for slot, phrases in book.slots.items():
        assert len(set(phrases)) == len(phrases), slot
        assert not any("\n" in phrase or "  " in phrase for phrase in phrases), slot
    first = book.caption({slot: phrases[0] for slot, phrases in book.slots.items()})
    assert first == "a photo of a dog"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("thing: [cat]\n", "form: must be text with slots"),
        ('form: "a {thing}"\n', "thing: is missing"),
        ('form: "a {thing}"\nthing: [cat, cat]\n', "a list of phrases, each once"),
        ('form: "a {thing}"\nthing: [cat]\nthnig: [dog]\n', 'did you mean "thing"?'),
        ('form: "a {thing}"\nthing: [cat]\nsubject: dog\n', "subject: must be the name of a slot"),
        ('form: "a {thing}"\nthing: [cat]\nitself: [dog]\n', "itself: must be a list of names"),
    ],
)
def test_faulty_phrases_are_refused_with_their_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "phrases.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(phrases=str(path))
    assert says in str(caught.value)
    assert f"{path}:" in str(caught.value)


def test_a_class_noun_needs_a_slot(tmp_path: Path) -> None:
    path = tmp_path / "phrases.yaml"
    path.write_text('form: "a {thing}"\nthing: [cat]\n')
    with pytest.raises(UserError, match="do not say which slot names the subject"):
        load(Wishes(class_noun="robot"), phrases=str(path))
