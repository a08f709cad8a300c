"""Renders the training pictures once, on all processors, into files that stages map into memory."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunekit.toybox import world

CHUNK = 1000
PIXELS = 64


@dataclass(frozen=True)
class Pictures:
    """Rendered pictures [N, 64, 64, 3] uint8 with one line of facts each."""

    pixels: Any
    facts: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.facts)

    def __add__(self, other: Pictures) -> Pictures:
        return Pictures(np.concatenate([self.pixels, other.pixels]), self.facts + other.facts)


def _facts(scene: world.Scene, rng: world.Rng, individual: int = -1) -> dict[str, Any]:
    subject, colour, place, style = scene.attributes()
    return {
        "caption": world.caption(scene, rng), "subject": subject, "colour": colour,
        "place": place, "style": style, "figures": len(scene.figures), "individual": individual,
    }  # fmt: skip


def _full(rng: world.Rng, index: int) -> list[tuple[world.Scene, int]]:
    return [(world.sample_training_scene(rng, world.FULL), -1)]


def _core(rng: world.Rng, index: int) -> list[tuple[world.Scene, int]]:
    return [(world.sample_training_scene(rng, world.CORE, pairs=0.04), -1)]


def _odd(rng: world.Rng, index: int) -> list[tuple[world.Scene, int]]:
    pose = world.sample_pose(rng, world.sample_odd_individual(rng, world.FULL), world.FULL)
    place, style = str(rng.choice(world.FULL.places)), str(rng.choice(world.FULL.styles))
    return [(world.Scene((pose,), place, style, int(rng.integers(1 << 31))), -1)]


def _same(rng: world.Rng, index: int) -> list[tuple[world.Scene, int]]:
    """Four pictures of one individual, elsewhere each time and in other styles."""
    who = world.sample_individual(rng, world.FULL)
    scenes = []
    for _ in range(4):
        pose = world.sample_pose(rng, who, world.FULL, dressed=0.1)
        place, style = str(rng.choice(world.FULL.places)), str(rng.choice(world.FULL.styles))
        scenes.append((world.Scene((pose,), place, style, int(rng.integers(1 << 31))), index))
    return scenes


KINDS: dict[str, Callable[[world.Rng, int], list[tuple[world.Scene, int]]]] = {
    "full": _full,
    "core": _core,
    "same": _same,
    "odd": _odd,
}


def _chunk(job: tuple[str, int, int]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    kind, number, seed = job
    rng = np.random.default_rng([seed, number])
    pixels: list[np.ndarray] = []
    facts: list[dict[str, Any]] = []
    while len(facts) < CHUNK:
        for scene, individual in KINDS[kind](rng, number * CHUNK + len(facts)):
            pixels.append(np.asarray(world.render(scene, PIXELS)))
            facts.append(_facts(scene, rng, individual))
    return np.stack(pixels[:CHUNK]), facts[:CHUNK]


def pictures(folder: Path, kind: str, count: int, seed: int, processes: int) -> Pictures:
    """Open the rendered set `kind` of `count` pictures, rendering what is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks = (count + CHUNK - 1) // CHUNK
    missing = [i for i in range(chunks) if not (folder / f"{kind}-{i:04d}.json").exists()]
    if missing:
        jobs = [(kind, i, seed) for i in missing]
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for done, (i, (pixels, facts)) in enumerate(
                zip(missing, pool.imap(_chunk, jobs), strict=True), 1
            ):
                np.save(folder / f"{kind}-{i:04d}.npy", pixels)
                (folder / f"{kind}-{i:04d}.json").write_text(json.dumps(facts))
                print(f"pictures {kind}: {done * CHUNK}/{len(missing) * CHUNK}", flush=True)
    facts_all: list[dict[str, Any]] = []
    for i in range(chunks):
        facts_all += json.loads((folder / f"{kind}-{i:04d}.json").read_text())
    arrays = [np.load(folder / f"{kind}-{i:04d}.npy") for i in range(chunks)]
    return Pictures(np.concatenate(arrays)[:count], facts_all[:count])
