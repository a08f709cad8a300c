"""Draws the pictures that decide, embeds them once, and scores them.

Two functions draw: one with the untouched base, one with what was trained. The same prompts and
seeds go through both, with the trigger replaced by the class noun for the base, which does not know
the trigger. No picture is drawn twice, and nothing here depends on a model family or adapter kind.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tunekit.data.captions import fill
from tunekit.evaluation import scores
from tunekit.evaluation.scores import Score
from tunekit.evaluation.verdict import verdict

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from tunekit.evaluation.embedders import Clip
    from tunekit.evaluation.judges import Judges

SCHEMA_VERSION = 1
DRIFT_PICTURES = 4

Draw = Callable[[str, int], "Image"]


@dataclass(frozen=True)
class Reference:
    """A real picture: its name, its pixels as training sees them, and its caption."""

    name: str
    image: Image
    caption: str


@dataclass(frozen=True)
class Question:
    """What is asked: prompt templates with {trigger} and {class}, and seeds."""

    kind: str
    trigger: str
    class_noun: str
    prompts: Sequence[str]
    seeds: Sequence[int]
    seed: int = 0

    def told(self, template: str) -> str:
        """Return the prompt as the trained model is told it."""
        return fill(template, self.trigger, self.class_noun)

    def plain(self, template: str) -> str:
        """Return the prompt in words the base knows: the trigger replaced by the class noun."""
        known = template.replace("{trigger} {class}", "{class}").replace("{trigger}", "{class}")
        return fill(known, self.class_noun, self.class_noun)

    def plain_caption(self, caption: str) -> str:
        """Return a real picture's caption with the trigger replaced by the class noun."""
        word, noun = re.escape(self.trigger), re.escape(self.class_noun)
        return re.sub(rf"(?<!\w){word}(\s+{noun})?(?!\w)", self.class_noun, caption)

    def drift(self) -> list[tuple[str, int]]:
        """Return prompts without the trigger, and seeds, that tell what else the adapter changed.

        A subject: "a {class}" with several seeds. A style: the contents of the prompts, for
        "a {class}" alone is no picture.
        """
        if self.kind == "style":
            return [(self.plain(text), self.seeds[0]) for text in self.prompts[:DRIFT_PICTURES]]
        seeds = list(dict.fromkeys(self.seeds))[:DRIFT_PICTURES]
        while len(seeds) < DRIFT_PICTURES:
            seeds.append(max(seeds) + 1)
        return [(f"a {self.class_noun}", seed) for seed in seeds]


@dataclass(frozen=True)
class Pair:
    """One prompt and seed, drawn before and after."""

    prompt: int
    told: str
    plain: str
    seed: int
    before: Image
    after: Image


def picture_name(who: str, prompt: str, seed: int) -> str:
    """Return a drawn picture's file name: who drew it ("base", "taught", a step), what, the seed.

    A plain prompt stands in it whole; a long or unwritable one is told apart by its hash.
    """
    words = prompt.replace(", ", "_").replace(" ", "-")
    if not re.fullmatch(r"[a-z0-9_-]{1,64}", words):
        plain = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:50].strip("-")
        words = f"{plain}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}".strip("-")
    return f"{who}_{words}_seed-{seed}.png"


@dataclass(frozen=True)
class Evaluation:
    """What was drawn and what it scored; `scores` is the content of scores.json."""

    pairs: list[Pair]
    drift: list[Pair]
    scores: dict[str, Any]


@dataclass
class Gallery:
    """Draws each (prompt, seed) once; `tick` is told after every picture really drawn."""

    draw: Draw
    tick: Callable[[], None] = lambda: None
    drawn: dict[tuple[str, int], Image] = field(default_factory=dict)

    def __call__(self, prompt: str, seed: int) -> Image:
        """Return the picture, drawn now or before."""
        if (prompt, seed) not in self.drawn:
            self.drawn[prompt, seed] = self.draw(prompt, seed)
            self.tick()
        return self.drawn[prompt, seed]


def count_pictures(question: Question) -> int:
    """Return how many pictures `measure` will draw."""
    shots = [(text, seed) for text in question.prompts for seed in question.seeds]
    drift = question.drift()
    before = {(question.plain(text), seed) for text, seed in shots} | set(drift)
    after = {(question.told(text), seed) for text, seed in shots} | set(drift)
    return len(before) + len(after)


def draw_pairs(question: Question, base: Draw, taught: Draw) -> tuple[list[Pair], list[Pair]]:
    """Draw the pairs of the prompts, and those of the drift.

    All of the base's come first, so that a caller may build the trained pipeline only then.
    """
    shots = [
        (index, question.told(text), question.plain(text), seed)
        for index, text in enumerate(question.prompts)
        for seed in question.seeds
    ]
    drift = [(index, text, text, seed) for index, (text, seed) in enumerate(question.drift())]
    before = [base(plain, seed) for _, _, plain, seed in shots + drift]
    after = [taught(told, seed) for _, told, _, seed in shots + drift]
    pairs = [
        Pair(*shot, before=old, after=new)
        for shot, old, new in zip(shots + drift, before, after, strict=True)
    ]
    return pairs[: len(shots)], pairs[len(shots) :]


def measure(
    question: Question,
    base: Draw,
    taught: Draw,
    training: Sequence[Reference],
    held_out: Sequence[Reference],
    judges: Judges,
) -> Evaluation:
    """Draw before and after, and score: likeness, fidelity, leak, shift, copies.

    `training` and `held_out` are the real pictures; without held-out ones the ceiling comes from
    the training pictures among themselves. Deterministic: the same pictures give the same scores.
    """
    pairs, drift = draw_pairs(question, base, taught)
    sums, per_picture = _score_prompts(question, pairs, training, held_out, judges)
    ceiling = sums["likeness"]["ceiling"]
    sums |= _score_drift(question, drift, training, judges, ceiling)
    result = {
        "schema_version": SCHEMA_VERSION,
        "kind": question.kind,
        "trigger": question.trigger,
        "class": question.class_noun,
        "encoders": {
            "likeness": {"name": judges.likeness.what, "source": judges.likeness.source},
            "clip": {"name": judges.clip.what, "source": judges.clip.source},
        },
        "pictures": {
            "training": len(training),
            "held_out": len(held_out),
            "prompts": len(question.prompts),
            "seeds": list(question.seeds),
            "scored": len(pairs),
        },
        "scores": sums,
        "prompts": _per_prompt(question, per_picture, sums, training),
    }
    result["verdict"] = verdict(result)
    return Evaluation(pairs, drift, result)


def _score_prompts(
    question: Question,
    pairs: Sequence[Pair],
    training: Sequence[Reference],
    held_out: Sequence[Reference],
    judges: Judges,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the sums of likeness, fidelity and copies, and a record for each pair."""
    before, after = [pair.before for pair in pairs], [pair.after for pair in pairs]
    which = [pair.prompt for pair in pairs]
    like = judges.likeness.embed_images
    real = like([reference.image for reference in training])
    unseen = like([reference.image for reference in held_out]) if held_out else None
    ceiling, ceiling_from = scores.ceiling_of(real, unseen)
    likeness = scores.likeness(like(after), real)
    floor = scores.likeness(like(before), real)

    see = judges.clip.embed_images
    whole_unseen = see([reference.image for reference in held_out]) if held_out else None
    old, new = see(before), see(after)
    texts = judges.clip.embed_texts([pair.plain for pair in pairs])
    told, base_told = scores.fidelity(new, texts), scores.fidelity(old, texts)
    near = scores.nearest(new, see([reference.image for reference in training]))
    closest, copies = _copies(after, training, held_out)

    gap = scores.smallest_gap(floor)
    summed = Score.between(scores.mean(likeness), scores.mean(floor), ceiling, gap)
    sums = {
        "likeness": asdict(summed)
        | {
            "ceiling_from": ceiling_from,
            "closed_95": scores.interval(likeness, floor, ceiling, which, question.seed)
            if summed.closed is not None
            else None,
        },
        "fidelity": _fidelity(question, told, base_told, held_out, whole_unseen, judges.clip)
        | _kept(told, base_told, scores.chance_fidelity(old, texts, which)),
        "copied": _copied(copies, closest),
    }
    records = [
        {
            "prompt": pair.prompt,
            "seed": pair.seed,
            "file": f"samples/{picture_name('taught', pair.told, pair.seed)}",
            "base_file": f"samples/{picture_name('base', pair.plain, pair.seed)}",
            "likeness": likeness[row],
            "floor": floor[row],
            "fidelity": told[row],
            "base_fidelity": base_told[row],
            "nearest": training[copies[row][0] if copies[row][2] else near[row][0]].name,
            "nearest_similarity": near[row][1],
            "tile_distance": copies[row][1],
            "copied": copies[row][2],
        }
        for row, pair in enumerate(pairs)
    ]
    return sums, records


def _copied(copies: Sequence[tuple[int, float, bool]], closest: float | None) -> dict[str, Any]:
    """Return the sums of what `_copies` found."""
    count = sum(copied for _, _, copied in copies)
    return {
        "score": count / len(copies),
        "count": count,
        "of": len(copies),
        "closest_real_pair": closest,
        "closest": min(distance for _, distance, _ in copies),
    }


def _copies(
    drawn: Sequence[Image], training: Sequence[Reference], held_out: Sequence[Reference]
) -> tuple[float | None, list[tuple[int, float, bool]]]:
    """Return the distance of the closest real pair, and what each drawn picture is closest to."""
    real = small_pixels([reference.image for reference in training])
    unseen = small_pixels([reference.image for reference in held_out]) if held_out else None
    closest = scores.closest_real_pair(real, unseen)
    return closest, scores.copies(small_pixels(drawn), real, closest)


def small_pixels(images: Sequence[Image]) -> Tensor:
    """Return pictures reduced to 32 x 32 pixels of 0 to 1, [N, 3, 32, 32]."""
    import numpy as np
    import torch
    from PIL import Image as Pillow

    size = (scores.EDGE, scores.EDGE)
    rows = [
        np.asarray(image.convert("RGB").resize(size, Pillow.Resampling.BOX), dtype=np.float32) / 255
        for image in images
    ]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)


def _fidelity(
    question: Question,
    told: Sequence[float],
    base_told: Sequence[float],
    held_out: Sequence[Reference],
    pictures: Tensor | None,
    clip: Clip,
) -> dict[str, Any]:
    """Return prompt fidelity: floor is the base's, ceiling that of held-out pictures to captions.

    The ceiling needs captions that tell the pictures apart; one caption for all has none.
    """
    ceiling = None
    captions = [question.plain_caption(reference.caption) for reference in held_out]
    if pictures is not None and len(set(captions)) > 1:
        fits = [row for row, caption in enumerate(captions) if clip.fits(caption)]
        if fits:
            texts = clip.embed_texts([captions[row] for row in fits])
            ceiling = scores.mean(scores.fidelity(pictures[fits], texts))
    score = Score.between(scores.mean(told), scores.mean(base_told), ceiling, gap=1.0)
    return asdict(score) | {"unit": "points"}


def _kept(
    told: Sequence[float], base_told: Sequence[float], chance: float | None
) -> dict[str, float | None]:
    """Return the change in points and the share kept of what the base has above chance."""
    score, base = scores.mean(told), scores.mean(base_told)
    kept = None if chance is None else scores.share_closed(score, chance, base, gap=1.0)
    return {"change": score - base, "chance": chance, "kept": kept}


def _score_drift(
    question: Question,
    drift: Sequence[Pair],
    training: Sequence[Reference],
    judges: Judges,
    ceiling: float | None,
) -> dict[str, Any]:
    """Return leak (likeness without the trigger) and shift (distance to the base's pictures)."""
    before, after = [pair.before for pair in drift], [pair.after for pair in drift]
    like, see = judges.likeness.embed_images, judges.clip.embed_images
    real = like([reference.image for reference in training])
    leak = Score.between(
        scores.mean(scores.likeness(like(after), real)),
        scores.mean(scores.likeness(like(before), real)),
        ceiling,
    )
    old = see(before)
    spread = scores.seed_spread(old)
    shift = Score.between(scores.mean(scores.shift(see(after), old)), 0.0, spread)
    prompts = list(dict.fromkeys(pair.plain for pair in drift))
    return {
        "leak": asdict(leak) | {"prompts": prompts},
        "shift": asdict(shift) | {"prompts": prompts},
    }


def _per_prompt(
    question: Question,
    records: Sequence[dict[str, Any]],
    sums: dict[str, Any],
    training: Sequence[Reference],
) -> list[dict[str, Any]]:
    """Return likeness and fidelity per prompt, each with the records of its pictures."""
    result = []
    captions = {reference.caption.strip().lower() for reference in training}
    for index, template in enumerate(question.prompts):
        rows = [record for record in records if record["prompt"] == index]

        def average(key: str, rows: Sequence[dict[str, Any]] = rows) -> float:
            return scores.mean([row[key] for row in rows])

        likeness = Score.between(average("likeness"), average("floor"), sums["likeness"]["ceiling"])
        fidelity = Score.between(
            average("fidelity"), average("base_fidelity"), sums["fidelity"]["ceiling"], gap=1.0
        )
        result.append(
            {
                "prompt": question.told(template),
                "base_prompt": question.plain(template),
                "trained_with": question.told(template).strip().lower() in captions,
                "likeness": asdict(likeness),
                "fidelity": asdict(fidelity)
                | {"unit": "points", "change": fidelity.score - (fidelity.floor or 0.0)},
                "pictures": [
                    {key: value for key, value in row.items() if key != "prompt"} for row in rows
                ],
            }
        )
    return result
