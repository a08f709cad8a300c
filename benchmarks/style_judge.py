"""Which embedding tells a style that has no name? Why `evaluate.kind: style` judges as it does.

    python benchmarks/style_judge.py [--scenes 32]

Draws the same scenes in the bundled style and in four others, and compares each embedding's
likeness to the style's training pictures. `separation`: how many standard deviations lie between
the style and the other; `won`: share of scenes where the picture in the style is the liker one;
`closed`: where real pictures of the style stand between floor and ceiling, 1 is right. Writes
benchmarks/results/style_judge.json. About a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tunekit.data import fit, open_rgb
from tunekit.evaluation.embedders import Clip, SubjectEncoder
from tunekit.evaluation.judges import StyleEncoder
from tunekit.toybox import world
from tunekit.toybox.palette import UNSEEN_STYLE

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "style_judge.json"
DATA = ROOT / "datasets" / "krafto"
OTHERS = ("flat", "outline", "pixel art", "watercolour")
SIDE = 64

Embed = Callable[[Sequence[Image.Image]], torch.Tensor]


def scenes(count: int) -> list[world.Scene]:
    """Return scenes of one subject each, of the world's core words."""
    rng, made = np.random.default_rng(5), []
    for number in range(count):
        who = world.Individual(
            str(rng.choice(world.CORE.subjects)), str(rng.choice(world.CORE.colours))
        )
        figure = world.Figure(who, str(rng.choice(["medium", "big"])), mirror=rng.random() < 0.5)
        place = str(rng.choice(world.CORE.places))
        made.append(world.Scene((figure,), place, UNSEEN_STYLE, number))
    return made


def folder(name: str) -> list[Image.Image]:
    """Return a folder's pictures as training sees them."""
    return [fit(open_rgb(path), SIDE) for path in sorted((DATA / name).glob("*.png"))]


def compare(embed: Embed, drawn: dict[str, list[Image.Image]]) -> dict[str, dict[str, float]]:
    """Return separation, won and closed of an embedding against each other style."""
    references = embed(folder("train"))

    def likeness(images: list[Image.Image]) -> torch.Tensor:
        return (embed(images) @ references.T).mean(dim=1).double()

    ceiling, style = likeness(folder("held_out")).mean(), likeness(drawn[UNSEEN_STYLE])
    told = {}
    for name in OTHERS:
        other = likeness(drawn[name])
        gap = style.mean() - other.mean()
        spread = ((style.var() + other.var()) / 2).sqrt()
        told[name] = {
            "separation": round(float(gap / spread), 2),
            "won": round(float((style > other).double().mean()), 2),
            "closed": round(float(gap / (ceiling - other.mean())), 2),
        }
    return told


def main() -> None:
    """Measure, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=32)
    count = parser.parse_args().scenes
    drawn = {
        style: [world.render(replace(scene, style=style), SIDE) for scene in scenes(count)]
        for style in (UNSEEN_STYLE, *OTHERS)
    }
    subject, clip = SubjectEncoder.load("toybox"), Clip.load("toybox")
    embeddings: dict[str, Embed] = {
        "subject encoder": subject.embed_images,
        "CLIP": clip.embed_images,
        "texture": subject.texture,
        "CLIP and texture": StyleEncoder(subject, clip).embed_images,
    }
    table = {name: compare(embed, drawn) for name, embed in embeddings.items()}
    for name, told in table.items():
        print(f"{name:18}", "  ".join(f"{s} {v['separation']:5.2f}" for s, v in told.items()))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"scenes": count, "embeddings": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
