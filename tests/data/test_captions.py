from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunekit.data.captions import all_texts, at_visit, expand, fill, holds, insert_trigger
from tunekit.errors import UserError
from tunekit.schema_data import Data
from tunekit.schema_source import Captions


def test_placeholders_are_filled() -> None:
    assert fill("a {trigger} {class}", "zorp", "robot") == "a zorp robot"
    assert fill("no placeholder", "zorp", "robot") == "no placeholder"
    assert fill("{{trigger}} {trigger}", "zorp", "robot") == "{trigger} zorp"


def test_a_value_is_not_filled_in_again() -> None:
    assert fill("a {trigger}", "{class}", "robot") == "a {class}"


def test_an_empty_value_leaves_no_gap() -> None:
    assert fill("a {trigger} {class}", "", "robot") == "a robot"
    assert fill("{trigger} {class}", "", "robot") == "robot"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("a {triger}", '(did you mean "trigger"?)'),
        ("a {red|blue} {class}", "unknown placeholder"),
        ("a {}", "unknown placeholder"),
        ("a {trigger", 'single "{"'),
        ("a trigger}", 'single "}"'),
    ],
)
def test_a_typing_error_is_refused(template: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        fill(template, "zorp", "robot")
    assert says in str(caught.value)
    assert template in str(caught.value)


def test_filling_loads_neither_pillow_nor_torch() -> None:
    code = (
        "import sys; from tunekit.data.captions import fill; "
        "assert not {'torch', 'PIL', 'numpy', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def recipe_data(caption: str | tuple[str, ...] | None = None, **captions: Any) -> Data:
    if caption is not None:
        captions["template"] = caption
    return Data(**{"source": "x", "trigger": "zorp", "class": "robot", "captions": captions})


def test_a_word_is_found_as_a_word_only() -> None:
    assert holds("a Zorp, waving", "zorp")
    assert holds("a <zorp> robot", "<zorp>")
    assert not holds("zorpish robots", "zorp")
    assert holds("anything", "")


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("a robot on the beach", "a zorp robot on the beach"),
        ("a red Robot", "a red zorp Robot"),
        ("a zorp robot", "a zorp robot"),
        ("robots everywhere", "zorp robot, robots everywhere"),
        ("", "zorp robot"),
    ],
)
def test_the_trigger_goes_before_the_class_noun_or_in_front_with_it(
    text: str, becomes: str
) -> None:
    assert insert_trigger(text, "zorp", "robot") == becomes


def test_the_article_fits_the_inserted_trigger() -> None:
    assert insert_trigger("an owl", "zorp", "owl") == "a zorp owl"
    assert insert_trigger("A robot", "umbo", "robot") == "An umbo robot"
    assert insert_trigger("a tall owl", "umbo", "owl") == "a tall umbo owl"


def test_captions_of_a_picture_are_filled_and_the_template_is_for_those_without() -> None:
    data = recipe_data(("a {trigger} {class}", "{trigger}"))
    assert expand(("a {class} at sea", "zorp"), data) == ("a robot at sea", "zorp")
    assert expand((), data) == ("a zorp robot", "zorp")


def test_a_list_of_templates_is_known_by_its_name() -> None:
    given = expand((), recipe_data("textual-inversion-object"))
    assert len(given) == 27
    assert "a photo of a zorp robot" in given


def test_the_trigger_is_inserted_only_where_asked_and_missing() -> None:
    told = ("a robot", "zorp at sea")
    assert expand(told, recipe_data()) == told
    assert expand(told, recipe_data(trigger="insert")) == ("a zorp robot", "zorp at sea")
    by_prefix = recipe_data(trigger="insert", prefix="{trigger} {class}:")
    assert expand(("at sea",), by_prefix) == ("zorp robot: at sea",)


@pytest.mark.parametrize(
    ("prefix", "suffix", "whole"),
    [
        ("photo of", "at sea", "photo of a robot at sea"),
        ("photo, ", ", 4k", "photo, a robot, 4k"),
        ("photo,", "!", "photo, a robot!"),
    ],
)
def test_prefix_and_suffix_stand_around_with_one_space(
    prefix: str, suffix: str, whole: str
) -> None:
    assert expand(("a robot",), recipe_data(prefix=prefix, suffix=suffix)) == (whole,)


def test_all_faults_of_a_pictures_captions_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        expand(("a {red|blue} robot", "a {triger}", " "), recipe_data())
    for part in ("{red|blue}", 'did you mean "trigger"', "empty"):
        assert part in str(caught.value)


def test_every_caption_comes_once_a_round_and_rounds_differ() -> None:
    captions = tuple("abcdef")
    rounds = [
        [at_visit(captions, Captions(), 7, "key", 6 * r + i) for i in range(6)] for r in range(20)
    ]
    assert all(sorted(r) == list(captions) for r in rounds)
    assert len({tuple(r) for r in rounds}) > 10


def test_words_depend_on_seed_picture_and_visit_alone() -> None:
    settings = Captions(shuffle=True, dropout=0.2, tag_dropout=0.2)
    captions = ("a, b, c, d, e", "f, g, h")

    def told(seed: int, key: str, visits: Iterable[int]) -> dict[int, str]:
        return {v: at_visit(captions, settings, seed, key, v) for v in visits}

    forth, back = told(1, "key", range(50)), told(1, "key", reversed(range(50)))
    assert forth == back
    assert forth != told(2, "key", range(50))
    assert forth != told(1, "other", range(50))


def test_dropout_empties_the_given_share_of_visits() -> None:
    settings = Captions(dropout=0.25)
    empty = [at_visit(("a",), settings, 3, "key", v) for v in range(2000)].count("")
    assert 430 < empty < 570


def test_tags_are_dropped_in_the_given_share_and_kept_ones_never() -> None:
    settings = Captions(tag_dropout=0.5, keep_tokens=1)
    told = [at_visit(("a, b, c",), settings, 3, "key", v).split(", ") for v in range(1000)]
    assert all(tags[0] == "a" for tags in told)
    assert 430 < sum("b" in tags for tags in told) < 570
    assert 200 < sum(tags == ["a", "b", "c"] for tags in told) < 300


@given(
    tags=st.lists(st.sampled_from(["a", "b c", "d", "e", "f"]), min_size=1, max_size=8),
    keep=st.integers(0, 9),
    visit=st.integers(0, 10**9),
)
def test_a_shuffled_caption_has_the_same_tags_and_begins_as_kept(
    tags: list[str], keep: int, visit: int
) -> None:
    settings = Captions(shuffle=True, keep_tokens=keep)
    told = at_visit((", ".join(tags),), settings, 0, "key", visit).split(", ")
    assert sorted(told) == sorted(tags)
    assert told[:keep] == tags[:keep]


@pytest.mark.parametrize(
    ("prefix", "suffix", "begins", "ends"),
    [
        ("photo, ", ", 4k, sharp", "photo", "4k, sharp"),
        ("photo of", "at sea", "photo of a", "f at sea"),
    ],
)
def test_prefix_and_suffix_stay_in_place_when_tags_are_shuffled(
    prefix: str, suffix: str, begins: str, ends: str
) -> None:
    data = recipe_data(prefix=prefix, suffix=suffix, shuffle=True)
    captions = expand(("a, b, c, d, e, f",), data)
    told = {at_visit(captions, data.captions, 0, "key", v) for v in range(50)}
    assert len(told) > 20
    assert all(text.startswith(begins) and text.endswith(ends) for text in told)


def test_another_separator_is_kept() -> None:
    settings = Captions(shuffle=True, separator=" | ")
    told = {at_visit(("a, b | c | d",), settings, 0, "key", v) for v in range(50)}
    assert len(told) == 6
    assert "c | a, b | d" in told


@pytest.mark.parametrize(
    ("captions", "settings"),
    [
        (("a, b", "c"), Captions()),
        (("a, b", "c"), Captions(dropout=0.3)),
        (("a, b", "c"), Captions(shuffle=True, keep_tokens=1, dropout=0.3)),
        (("a,b ,", "c"), Captions(tag_dropout=0.3, keep_tokens=2)),
    ],
)
def test_all_texts_are_those_that_visits_give(captions: Any, settings: Captions) -> None:
    told = {at_visit(captions, settings, 0, "key", v) for v in range(200)}
    assert all_texts(captions, settings) == told


@pytest.mark.parametrize("settings", [Captions(shuffle=True), Captions(tag_dropout=0.1)])
def test_texts_of_changed_tags_are_too_many_to_list(settings: Captions) -> None:
    assert all_texts(("a, b, c",), settings) is None
