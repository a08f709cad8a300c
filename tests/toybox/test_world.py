"""The toy world: the same scene is the same picture, and all its words are drawn and told."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tunekit import toybox
from tunekit.toybox import world
from tunekit.toybox.palette import COLOURS, SHADES
from tunekit.toybox.pretrain.words import LENGTH, load_tokenizer

LEVELS = [
    98.2,
    140.23,
    171.74,
    142.63,
    94.23,
    210.18,
    110.01,
    202.23,
    223.02,
    206.27,
    103.79,
    219.49,
]  # mean grey of twelve pictures


def scenes(count: int, seed: int, **options: float) -> list[world.Scene]:
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng, world.FULL, **options) for _ in range(count)]


def test_a_seed_gives_the_same_scenes_pictures_and_captions() -> None:
    def told() -> list[tuple[world.Scene, bytes, str]]:
        rng = np.random.default_rng(17)
        return [
            (scene, world.render(scene).tobytes(), world.caption(scene, rng))
            for scene in scenes(24, 16, pairs=0.3)
        ]

    assert told() == told()


def test_a_scene_looks_the_same_on_every_day() -> None:
    """The bundled weights were taught these very pictures: a changed brush must not go unseen."""
    seen = np.stack([np.asarray(world.render(s)) for s in scenes(12, 18)])
    # levels and not a hash of bytes: another version of Pillow may round an edge differently
    assert seen.mean(axis=(1, 2, 3)).tolist() == pytest.approx(LEVELS, abs=1)


def test_the_world_is_as_large_as_it_says() -> None:
    assert len(set(world.FULL.subjects)) >= 20
    assert len(set(world.FULL.colours)) >= 10
    assert len(set(world.FULL.places)) >= 8
    assert len(set(world.FULL.styles)) >= 6
    for large, small in zip(
        (world.FULL.subjects, world.FULL.colours, world.FULL.places, world.FULL.styles),
        (world.CORE.subjects, world.CORE.colours, world.CORE.places, world.CORE.styles),
        strict=True,
    ):
        assert set(small) < set(large)


def test_every_word_is_sampled_and_so_are_pairs_and_clothes() -> None:
    drawn = scenes(3000, 19)
    for place, words in enumerate(
        (world.FULL.subjects, world.FULL.colours, world.FULL.places, world.FULL.styles)
    ):
        assert {s.attributes()[place] for s in drawn} == set(words)
    assert 0.05 < np.mean([len(s.figures) == 2 for s in drawn]) < 0.12
    worn = Counter(f.accessory for s in drawn for f in s.figures)
    assert worn["hat"] > 50
    assert worn["scarf"] > 50
    sizes = Counter(f.size for s in drawn for f in s.figures)
    assert set(sizes) == {"small", "medium", "big"}
    assert {f.position for s in drawn for f in s.figures} == {"left", "middle", "right"}


@pytest.mark.parametrize("axis", range(4), ids=["subject", "colour", "place", "style"])
def test_every_word_has_a_look_of_its_own(axis: int) -> None:
    """Scenes that differ in one word alone are different pictures."""
    words = (world.FULL.subjects, world.FULL.colours, world.FULL.places, world.FULL.styles)
    pictures = set()
    for word in words[axis]:
        subject, colour, place, style = (
            word if i == axis else w for i, w in enumerate(("cat", "red", "beach", "flat"))
        )
        figure = world.Figure(world.Individual(subject, colour))
        picture = world.render(world.Scene((figure,), place, style, 4))
        assert picture.size == (64, 64)
        assert picture.mode == "RGB"
        pictures.add(picture.tobytes())
    assert len(pictures) == len(words[axis])


def test_clothes_pairs_marks_and_poses_are_seen() -> None:
    who = world.Individual("cat", "red")
    plain = world.Figure(who)
    variants = [
        (plain,),
        (world.Figure(who, accessory="hat", accessory_colour="blue"),),
        (world.Figure(who, accessory="scarf", accessory_colour="blue"),),
        (world.Figure(who, accessory="scarf", accessory_colour="green"),),
        (plain, world.Figure(world.Individual("car", "blue"), position="right")),
        (world.Figure(world.Individual("cat", "red", pattern="stripes")),),
        (world.Figure(who, size="big"),),
        (world.Figure(who, position="left"),),
        (world.Figure(who, mirror=True),),
    ]
    seen = {world.render(world.Scene(v, "beach", "flat", 3)).tobytes() for v in variants}
    assert len(seen) == len(variants)


def test_a_picture_is_the_same_at_any_resolution() -> None:
    for scene in scenes(18, 20, pairs=0.2):
        small = np.asarray(world.render(scene, 64)).astype(float)
        large = np.asarray(world.render(scene, 128)).astype(float)
        halved = large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        assert np.abs(small - halved).max() <= 1.5  # both were rounded once
        odd = world.render(scene, 100).resize((64, 64))
        assert np.abs(small - np.asarray(odd).astype(float)).mean() < 6


def test_training_never_samples_what_is_held_out() -> None:
    rng = np.random.default_rng(21)
    drawn = [world.sample_training_scene(rng, world.FULL, pairs=0.2) for _ in range(3000)]
    for scene in drawn:
        for figure in scene.figures:
            told = (figure.who.subject, figure.who.colour, scene.place, scene.style)
            assert not world.held_out(told)
    kept = [world.held_out(s.attributes()) for s in scenes(3000, 22)]
    assert 0.07 < np.mean(kept) < 0.13, "one combination in ten is kept out"


def test_captions_name_what_is_drawn() -> None:
    rng = np.random.default_rng(23)
    for scene in scenes(500, 24, pairs=0.2):
        told = world.caption(scene, rng, complete=True)
        for figure in scene.figures:
            assert f"{figure.who.colour} {figure.who.subject}" in told
            assert figure.accessory in told
        assert any(phrase in told for phrase in world.PLACE_WORDS[scene.place])
        assert any(phrase in told for phrase in world.STYLE_WORDS[scene.style])


def test_captions_may_leave_a_word_out_but_never_tell_a_wrong_one() -> None:
    rng = np.random.default_rng(25)
    shorter = 0
    for scene in scenes(1500, 26, pairs=0.0):
        told = world.caption(scene, rng).replace(",", " ").split()
        figure = scene.figures[0]
        asked = {figure.who.colour, figure.accessory_colour}
        assert {w for w in told if w in world.FULL.colours} <= asked
        assert {w for w in told if w in world.FULL.subjects} == {figure.who.subject}
        shorter += figure.who.colour not in told
    assert 0.02 < shorter / 1500 < 0.1


def marked(count: int, seed: int, words: world.Vocabulary = world.FULL) -> list[world.Scene]:
    rng = np.random.default_rng(seed)
    return [world.sample_marked_scene(rng, words) for _ in range(count)]


def test_captions_name_marks_and_shades_where_they_are_asked_to() -> None:
    rng = np.random.default_rng(31)
    for scene in marked(1000, 32):
        who = scene.figures[0].who
        told = world.caption(scene, rng, complete=True, marks=1.0)
        assert f"{who.colour} {who.subject}" in told
        if who.pattern != "plain":
            assert f"{who.accent} {who.pattern}".strip() in told
        assert ("plain" in told) == (who.pattern == "plain")
        assert not any(p in told for p in ("stripes", "spots", "patch") if p != who.pattern)


def test_a_share_of_the_marks_is_told_and_none_unasked() -> None:
    rng = np.random.default_rng(33)
    patterned = [s for s in marked(1500, 34) if s.figures[0].who.pattern != "plain"]
    assert 0.5 < len(patterned) / 1500 < 0.7
    for marks, low, high in ((0.0, 0.0, 0.0), (0.7, 0.63, 0.77)):
        told = [s.figures[0].who.pattern in world.caption(s, rng, marks=marks) for s in patterned]
        assert low <= np.mean(told) <= high


def test_every_shade_is_drawn_as_no_named_colour_is() -> None:
    def grey(who: world.Individual) -> bytes:
        return world.render(world.Scene((world.Figure(who),), "snow", "flat", 5)).tobytes()

    found = {s.figures[0].who.colour for s in marked(3000, 35)}
    assert set(SHADES) <= found
    pictures = {grey(world.Individual("cat", shade, main_rgb=SHADES[shade][1])) for shade in SHADES}
    named = {grey(world.Individual("cat", colour)) for colour in COLOURS}
    assert len(pictures) == len({rgb for _, rgb in SHADES.values()})
    assert not pictures & named
    core = {s.figures[0].who.colour for s in marked(3000, 36, world.CORE)}
    assert not any({"white", "brown"} & set(shade.replace("-", " ").split()) for shade in core)


def test_marked_training_keeps_out_what_is_held_out_and_shades_of_it() -> None:
    for scene in marked(3000, 37):
        subject, colour, place, style = scene.attributes()
        parts = SHADES[colour][0] if colour in SHADES else (colour,)
        assert not any(world.held_out((subject, part, place, style)) for part in parts)


def test_captions_fit_the_text_encoder() -> None:
    tokenizer = load_tokenizer(toybox.model_path() / "tokenizer")
    rng = np.random.default_rng(27)
    longest = 0
    for scene in [*scenes(3000, 28, pairs=0.5), *marked(6000, 38)]:
        told = world.caption(scene, rng, complete=True, marks=1.0)
        longest = max(longest, len(tokenizer(told).input_ids))
    assert longest <= LENGTH == tokenizer.model_max_length


def test_model_and_clip_read_the_same_words() -> None:
    rng = np.random.default_rng(29)
    told = [world.caption(s, rng) for s in scenes(200, 30)]
    folders = (toybox.model_path() / "tokenizer", toybox.clip_path())
    one, other = (load_tokenizer(folder)(told).input_ids for folder in folders)
    assert one == other
