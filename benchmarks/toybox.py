"""How good the bundled base is: the table, the sheet and the training curve of docs/toybox.md.

    python benchmarks/toybox.py [--pictures 256] [--guidance 4] [--work .pretrain]
                                [--only drawn|marks|clip]

Draws captions of attribute combinations that pretraining never saw together and lets the bundled
judge name what it sees; draws captions that name patterns and asks which pattern came; lets the
bundled CLIP name what 1,000 fresh pictures of the renderer show. Writes
benchmarks/results/toybox.json and docs/toybox-sheet.png, and with the log of a pretraining run at
hand docs/toybox-curve.svg. About four minutes on two CPU cores; --only clip about one.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from tunekit import toybox
from tunekit.evaluation.charts import Line, chart
from tunekit.evaluation.embedders import Clip, SubjectEncoder
from tunekit.toybox import world
from tunekit.toybox.palette import COLOURS, PATTERNS
from tunekit.toybox.pretrain import attributes
from tunekit.toybox.pretrain.assess import assess, draw

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "toybox.json"
STYLE = (
    "<style>polyline{fill:none;stroke:#0a7d5a;stroke-width:2}.rule{stroke:#ddd}"
    "text{font:11px sans-serif;fill:#666}.y{text-anchor:end}.x{text-anchor:middle}</style>"
)


def curve(log: Path, target: Path) -> None:
    """Draw the loss of the denoiser over thousands of samples, an average of each 1,000 steps."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    latest = {line["step"]: line for line in lines}  # a resumed run repeats steps
    points = [(line["samples"] / 1000, line["loss"]) for _, line in sorted(latest.items())]
    window = max(1, len(points) // 60)
    smooth = [
        (
            points[i][0],
            math.fsum(y for _, y in points[i : i + window]) / len(points[i : i + window]),
        )
        for i in range(0, len(points), window)
    ]
    drawn = chart([Line(smooth, "line")], "Loss over thousands of samples", top=1.0)
    target.write_text(
        drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
            "<title>", f"{STYLE}<title>", 1
        )
    )


def name_pictures(count: int = 1000, seed: int = 4343) -> dict[str, dict[str, float]]:
    """Percent of fresh pictures whose words the bundled CLIP names, by way of ranking."""
    rng = np.random.default_rng(seed)
    scenes = [world.sample_scene(rng, world.FULL, pairs=0.0) for _ in range(count)]
    facts = [dict(zip(attributes.WORDS, s.attributes(), strict=True)) for s in scenes]
    clip = Clip.load("toybox")
    images = clip.embed_images([world.render(s) for s in scenes])
    wordings = [clip.embed_texts(attributes.captions(w)) for w in attributes.WORDINGS]
    told: dict[str, dict[str, float]] = {}
    mean = torch.stack(wordings).mean(0)
    mean = mean / mean.norm(dim=1, keepdim=True)
    for name, texts in (("one wording", wordings[0]), ("six wordings", mean)):
        for way, shares in attributes.accuracy(images, texts, attributes.labels(facts)).items():
            told[f"{way}, {name}"] = shares
    return told


def name_marks(
    weights: Path, guidance: float, count: int = 96, seed: int = 4344
) -> dict[str, float]:
    """Percent of drawn pictures that show the pattern, and the accent, that their caption names.

    Decided by the bundled subject encoder: each picture is compared with the renderer's own of the
    scene, once in each pattern, once in each accent, and the nearest taken. Chance is 25 and 11.
    """
    rng = np.random.default_rng(seed)
    scenes: list[world.Scene] = []
    while len(scenes) < count:
        scene = world.sample_marked_scene(rng, world.CORE)
        figure = scene.figures[0]
        if figure.size != "small" and not figure.accessory and figure.who.colour in COLOURS:
            who = figure.who
            accent = str(rng.choice([c for c in COLOURS if c != who.colour]))
            who = replace(who, pattern=PATTERNS[len(scenes) % len(PATTERNS)], accent=accent)
            scenes.append(replace(scene, figures=(replace(figure, who=who),)))
    captions = [world.caption(s, rng, complete=True, marks=1.0) for s in scenes]
    pipeline = StableDiffusionPipeline.from_pretrained(weights / "model", dtype=torch.float32)
    encoder = SubjectEncoder.load("toybox")
    drawn = encoder.embed_images(draw(pipeline, captions, guidance))

    def nearest(row: int, key: str, words: Sequence[str]) -> bool:
        figure = scenes[row].figures[0]
        others = [
            replace(scenes[row], figures=(replace(figure, who=replace(figure.who, **{key: word})),))
            for word in words
        ]
        known = encoder.embed_images([world.render(scene) for scene in others])
        return words[int((known @ drawn[row]).argmax())] == getattr(figure.who, key)

    patterns = [nearest(row, "pattern", PATTERNS) for row in range(count)]
    accents = [
        nearest(row, "accent", [c for c in COLOURS if c != scene.figures[0].who.colour])
        for row, scene in enumerate(scenes)
        if scene.figures[0].who.pattern != "plain"
    ]
    return {k: round(100 * float(np.mean(v)), 1)
            for k, v in (("pattern", patterns), ("accent", accents))}  # fmt: skip


def show(table: dict[str, dict[str, float]], rows: list[str]) -> None:
    """Print rows of a table of percents."""
    for row in rows:
        print(f"{row:22}", *(f"{name} {share:5.1f}" for name, share in table[row].items()))


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--work", type=Path, default=ROOT / ".pretrain")
    parser.add_argument("--only", choices=["drawn", "marks", "clip"], help="leave the others alone")
    parser.add_argument(
        "--weights", type=Path, default=toybox.WEIGHTS, help="measure other weights"
    )
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULT.read_text())
    if options.only in (None, "clip"):
        found["clip"] = name_pictures()
        show(found["clip"], list(found["clip"]))
    if options.only in (None, "marks"):
        found["marks"] = name_marks(options.weights, options.guidance)
        show(found, ["marks"])
    if options.only in (None, "drawn"):
        options.work.mkdir(exist_ok=True)
        found |= assess(options.weights, options.work, options.pictures, options.guidance)
        show(found, ["bar", "rendered", "reconstructed", "drawn"])
    if options.weights != toybox.WEIGHTS:
        return
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    if options.only in ("marks", "clip"):
        return
    shutil.copy(options.work / "sheet.png", ROOT / "docs" / "toybox-sheet.png")
    log = options.work / "unet-training" / "log.jsonl"
    if log.exists():
        curve(log, ROOT / "docs" / "toybox-curve.svg")


if __name__ == "__main__":
    main()
