"""The report: whole, self-contained, honest; and the charts in it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tunekit.evaluation import charts
from tunekit.evaluation.embedders import Clip, SubjectEncoder
from tunekit.evaluation.judges import Judges
from tunekit.evaluation.measure import Evaluation, Question, Reference, measure
from tunekit.evaluation.report import Facts, Timeline, data_url, duration, size, write_report
from tunekit.evaluation.verdict import verdict

Paint = Callable[..., Image.Image]


class Page(HTMLParser):
    """Checks that tags close in order, and collects what points anywhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        if tag not in ("meta", "img", "br", "line", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "polyline"):
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def evaluation(
    clip_folder: Path,
    subject_folder: Path,
    paint: Paint,
    training: list[Reference],
    held_out: list[Reference],
) -> Evaluation:
    judges = Judges(SubjectEncoder.load(str(subject_folder)), Clip.load(str(clip_folder)))
    prompts = ("a {trigger} {class} <in> the snow", "a {trigger} {class} & a hat")
    question = Question("subject", "zorp", "robot", prompts, (1, 2))
    return measure(
        question,
        lambda prompt, seed: paint(seed, place="snow"),
        lambda prompt, seed: paint(seed + 9, place="night"),
        training,
        held_out,
        judges,
    )


def facts(**changes: Any) -> Facts:
    given: dict[str, Any] = {
        "name": "character",
        "made": "20 November 2026",
        "recipe": "name: character\ncaption: <b>bold</b>\n",
        "metrics": [{"step": i, "loss": 1 / i, "lr": 1e-4} for i in range(1, 50)],
        "timelines": [Timeline("a zorp", 1, [(0, Image.new("RGB", (8, 8)))])],
        "tables": {"Time": [("in all", "2 min 05 s")]},
        "files": [("export/x.safetensors", 620_000, "LoRA")],
        "command": "tunekit generate --run runs/x",
        "notes": ["chose <this>"],
    }
    return Facts(**{**given, **changes})


def test_the_page_is_whole_and_asks_nothing_of_the_network(
    evaluation: Evaluation, training: list[Reference], held_out: list[Reference]
) -> None:
    text = write_report(facts(), evaluation, training, held_out)
    page = Page(text)
    assert page.open == []
    assert page.links
    assert all(link.startswith("data:image/") for link in page.links)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not re.search(r"https?://|@import|url\(", text)
    # Four pairs and their nearest pictures, the hero, drift, training and held-out pictures.
    assert page.tags.count("img") == 4 * 3 + 2 + 4 * 2 + 6 + 3 + 1
    for said in (
        evaluation.scores["verdict"]["headline"],
        "a zorp robot &lt;in&gt; the snow",
        "&lt;b&gt;bold&lt;/b&gt;",
        "chose &lt;this&gt;",
        "2 min 05 s",
        "620 kB",
        "held-out real pictures",
    ):
        assert said in text, said


def test_without_held_out_pictures_curves_and_samples(
    evaluation: Evaluation, training: list[Reference]
) -> None:
    text = write_report(facts(metrics=[], timelines=[], notes=[]), evaluation, training, [])
    assert Page(text).open == []
    assert "never trained on" not in text


def test_small_pictures_are_carried_exactly_and_large_ones_reduced(paint: Paint) -> None:
    small, large = paint(1), paint(1, size=64).resize((1024, 1024))
    assert data_url(small).startswith("data:image/png")
    assert data_url(large).startswith("data:image/jpeg")
    assert len(data_url(large)) < 200_000


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(4.4, "4 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (4800, "1 h 20 min")],
)
def test_duration(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (620_000, "620 kB"), (1_400_000_000, "1.4 GB"), (9_900, "9.9 kB")],
)
def test_size(count: int, said: str) -> None:
    assert size(count) == said


def test_smoothing_is_unbiased_at_the_start() -> None:
    assert charts.smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    assert charts.smooth([1.0, 0.0], weight=0.5) == pytest.approx([1.0, 1 / 3])
    assert charts.smooth([]) == []


def test_ticks_are_round_and_inside() -> None:
    assert charts.ticks(0, 1) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert charts.ticks(1, 400, 6) == pytest.approx([100, 200, 300, 400])
    assert charts.ticks(5, 5) == [5]
    assert [charts.label(v) for v in (0, 1e-4, 2.5e-5, 0.05, 400)] == [
        "0",
        "1e-4",
        "2.5e-5",
        "0.05",
        "400",
    ]


def test_one_wild_step_does_not_flatten_the_curve() -> None:
    points = [(step, 0.1) for step in range(1, 400)] + [(400, 1000.0)]
    drawn = charts.loss_chart(points)
    assert "<svg" in drawn
    assert not any(math.isnan(float(n)) for n in re.findall(r"\d+\.\d+", drawn))
    assert "0.05" in drawn


def test_charts_of_nothing_and_of_one_step() -> None:
    assert charts.loss_chart([]) == ""
    assert charts.rate_chart([]) == ""
    assert "<svg" in charts.loss_chart([(1, 0.0)])
    assert len(charts.thin([(i, 0.0) for i in range(10_000)])) <= charts.MOST_POINTS + 1


def test_a_bar_is_widened_not_cut() -> None:
    half = charts.bar(0.5)
    assert half
    assert (half.zero, half.one, half.value, half.start, half.length) == (0, 100, 50, 0, 50)
    below = charts.bar(-1.0)
    assert below
    assert (below.zero, below.value, below.start, below.length) == (50, 0, 0, 50)
    above = charts.bar(2.0)
    assert above
    assert (above.one, above.value) == (50, 100)
    assert charts.bar(None) is None


def result(**changes: Any) -> dict[str, Any]:
    sums: dict[str, Any] = {
        "likeness": {"closed": 0.86, "ceiling": 0.9, "ceiling_from": "held-out"},
        "fidelity": {"change": -0.4},
        "leak": {"closed": 0.05},
        "shift": {"closed": 0.2},
        "copied": {"score": 0.0, "count": 0, "of": 16, "closest_real_pair": 0.2},
    }
    for name, change in changes.items():
        sums[name] = {**sums[name], **change}
    prompts = [{"trained_with": False}] * 8
    return {
        "kind": "subject",
        "trigger": "zorp",
        "class": "robot",
        "scores": sums,
        "prompts": prompts,
    }


@pytest.mark.parametrize(
    ("changes", "outcome", "headline", "tones"),
    [
        ({}, "learned", "It learned zorp robot.", "good good good good"),
        ({"likeness": {"closed": 0.5}}, "partly", "in part", "fair good good good"),
        ({"likeness": {"closed": 0.2}}, "barely", "barely", "fair good good good"),
        ({"likeness": {"closed": -0.1}}, "not", "did not learn", "poor good good good"),
        ({"likeness": {"closed": None}}, "unknown", "cannot be told", "fair good good good"),
        ({"fidelity": {"change": -3.0}}, "learned", "It learned", "good fair good good"),
        ({"fidelity": {"change": -9.0}}, "learned", "no longer follows", "good poor good good"),
        ({"leak": {"closed": 0.2}}, "learned", "It learned", "good good fair good"),
        ({"leak": {"closed": 0.9}}, "learned", "It learned", "good good poor good"),
        ({"leak": {"closed": None}}, "learned", "It learned", "good good good good"),
        ({"shift": {"closed": 0.7}}, "learned", "It learned", "good good fair good"),
        (
            {"leak": {"closed": None}, "shift": {"closed": None}},
            "learned",
            "It learned",
            "good good good",
        ),
        ({"copied": {"count": 1, "score": 0.06}}, "learned", "It learned", "good good good fair"),
        ({"copied": {"count": 9, "score": 0.56}}, "learned", "It learned", "good good good poor"),
        ({"copied": {"closest_real_pair": None}}, "learned", "It learned", "good good good"),
    ],
)
def test_the_verdict_says_what_the_numbers_say(
    changes: dict[str, Any], outcome: str, headline: str, tones: str
) -> None:
    said = verdict(result(**changes))
    assert said["outcome"] == outcome
    assert headline in said["headline"]
    assert [sentence["tone"] for sentence in said["sentences"]] == tones.split()
