"""The report: one HTML file that carries its pictures and asks nothing of the network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from tunekit.evaluation import charts
from tunekit.evaluation.verdict import percent, points, subject_of

if TYPE_CHECKING:
    from jinja2 import Template
    from PIL.Image import Image

    from tunekit.evaluation.measure import Evaluation, Pair, Reference

EXACT = 256  # pixels: up to this edge pictures are carried as they are, larger ones as JPEG
LARGEST = 640
PIXELATED = 128  # small pictures are enlarged with hard edges, so that one sees what is there


@dataclass(frozen=True)
class Timeline:
    """What one prompt and seed looked like at several steps of the run."""

    prompt: str
    seed: int
    pictures: list[tuple[int, Image]]


@dataclass(frozen=True)
class Facts:
    """What the report tells about the run besides scores and pictures.

    `tables` are titled lists of (name, value) pairs; `metrics` are the lines of metrics.jsonl;
    `files` are (path, bytes, note); `notes` are what the tool chose and said while it ran.
    `sheets` are titled parts of a contact sheet (HTML, with `styles` as their CSS). `keepers` are
    some of the `kept` pictures of the class that were trained beside the subject's.
    """

    name: str
    made: str
    recipe: str
    metrics: Sequence[Mapping[str, float | None]]
    timelines: Sequence[Timeline]
    tables: Mapping[str, Sequence[tuple[str, str]]]
    files: Sequence[tuple[str, int, str]]
    command: str
    notes: Sequence[str] = field(default_factory=tuple)
    sheets: Sequence[tuple[str, str]] = field(default_factory=tuple)
    styles: str = ""
    keepers: Sequence[Reference] = field(default_factory=tuple)
    kept: int = 0


def duration(seconds: float) -> str:
    """Return a time as people say it: "48 s", "2 min 05 s", "1 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Return a number of bytes with its unit: "620 kB", "1.4 GB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def data_url(image: Image) -> str:
    """Return the picture as a data: URL; small ones exact (PNG), large ones reduced (JPEG)."""
    buffer = io.BytesIO()
    picture = image.convert("RGB")
    if max(picture.size) <= EXACT:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((LARGEST, LARGEST))
        picture.save(buffer, "JPEG", quality=88, optimize=True)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_report(
    facts: Facts,
    evaluation: Evaluation,
    training: Sequence[Reference],
    held_out: Sequence[Reference],
) -> str:
    """Return report.html as text."""
    result = evaluation.scores
    images = {reference.name: data_url(reference.image) for reference in training}
    ranked = sorted(
        evaluation.pairs,
        key=lambda pair: _record(result, pair)["likeness"],
    )
    hero = ranked[len(ranked) // 2]
    edge = max(max(pair.after.size) for pair in evaluation.pairs)
    return _template().render(
        facts=facts,
        result=result,
        sums=result["scores"],
        verdict=result["verdict"],
        subject=subject_of(result),
        training=[(reference, images[reference.name]) for reference in training],
        held_out=[(reference, data_url(reference.image)) for reference in held_out],
        keepers=[(reference, data_url(reference.image)) for reference in facts.keepers],
        hero={
            "told": hero.told,
            "plain": hero.plain,
            "seed": hero.seed,
            "before": data_url(hero.before),
            "after": data_url(hero.after),
        },
        prompts=_prompts(result, evaluation.pairs, images),
        drift=[(pair, data_url(pair.before), data_url(pair.after)) for pair in evaluation.drift],
        rows=_rows(result),
        timelines=[
            (line, [(step, data_url(image)) for step, image in line.pictures])
            for line in facts.timelines
        ],
        loss=charts.loss_chart(_series(facts.metrics, "loss")),
        rate=charts.rate_chart(_series(facts.metrics, "lr")),
        pixelated=edge <= PIXELATED,
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tunekit.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "size": size,
        "bar": charts.bar,
        "cosine": _number,
    }
    return environment.get_template("report.html.j2")


def _series(metrics: Sequence[Mapping[str, float | None]], key: str) -> list[tuple[float, float]]:
    points = [(line["step"], line.get(key)) for line in metrics]
    return [(step, value) for step, value in points if step is not None and value is not None]


def _record(result: Mapping[str, Any], pair: Pair) -> Mapping[str, Any]:
    """Return the record of a pair's picture in the scores."""
    pictures = result["prompts"][pair.prompt]["pictures"]
    found: Mapping[str, Any] = next(row for row in pictures if row["seed"] == pair.seed)
    return found


def _prompts(
    result: Mapping[str, Any], pairs: Sequence[Pair], training: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return each prompt with its cards: before, after, nearest training picture, numbers."""
    prompts = []
    for index, record in enumerate(result["prompts"]):
        drawn = [pair for pair in pairs if pair.prompt == index]
        cards = [
            {
                "before": data_url(pair.before),
                "after": data_url(pair.after),
                "nearest_picture": training[row["nearest"]],
                **row,
            }
            for pair, row in zip(drawn, record["pictures"], strict=True)
        ]
        prompts.append({**record, "cards": cards})
    return prompts


@dataclass(frozen=True)
class Row:
    """A score on its track: a share, what stands at both ends, and whether more is better."""

    name: str
    says: str
    share: float | None
    value: str
    left: tuple[str, str]
    right: tuple[str, str]
    good: bool


def _number(value: float | None, digits: int = 3) -> str:
    text = "" if value is None else f"{value:.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _rows(result: Mapping[str, Any]) -> list[Row]:
    """Return the score bars."""
    sums, kind = result["scores"], result["kind"]
    like, told = sums["likeness"], sums["fidelity"]
    real = {"held-out": "held-out real pictures", None: "no real pictures to compare"}.get(
        like["ceiling_from"], "training pictures among themselves"
    )
    return [
        Row(
            f"{kind.capitalize()} likeness",
            f"Is it the {kind}? Mean cosine to the training pictures.",
            like["closed"],
            _number(like["score"]),
            ("untouched base", _number(like["floor"])),
            (real, _number(like["ceiling"])),
            good=True,
        ),
        Row(
            "Prompt fidelity",
            "Does it draw what the words say? CLIP, picture to prompt, in points; "
            f"{points(told['change'])} against the base.",
            told["kept"],
            _number(told["score"], 1),
            ("other prompts (chance)", _number(told["chance"], 1)),
            ("untouched base", _number(told["floor"], 1)),
            good=True,
        ),
        *_drift_rows(result, real),
    ]


def _drift_rows(result: Mapping[str, Any], real: str) -> list[Row]:
    leak, shift = result["scores"]["leak"], result["scores"]["shift"]
    subject = result["kind"] == "subject"
    what = f"\N{LEFT DOUBLE QUOTATION MARK}a {result['class']}\N{RIGHT DOUBLE QUOTATION MARK}"
    what = what if subject else "the same contents"
    return [
        Row(
            "Leak",
            f"Does {what} without the trigger look like it too? Less is better.",
            leak["closed"],
            _number(leak["score"]),
            ("untouched base", _number(leak["floor"])),
            (real, _number(leak["ceiling"])),
            good=False,
        ),
        Row(
            "Drift",
            f"How far did {what} without the trigger move? Less is better.",
            shift["closed"],
            _number(shift["score"]),
            ("not at all", "0"),
            (
                "as far as to another seed" if subject else "as far as to another content",
                _number(shift["ceiling"]),
            ),
            good=False,
        ),
    ]
