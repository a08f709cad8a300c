"""Renders the training pictures once, on all processors, into files that stages map into memory."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
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


MARKS_TOLD = 0.7  # share of the patterns that captions of kind "marked" name


def _facts(scene: world.Scene, rng: world.Rng, individual: int, marks: float) -> dict[str, Any]:
    subject, colour, place, style = scene.attributes()
    return {
        "caption": world.caption(scene, rng, marks=marks), "subject": subject, "colour": colour,
        "place": place, "style": style, "figures": len(scene.figures), "individual": individual,
    }  # fmt: skip


def _full(rng: world.Rng, index: int) -> list[tuple[world.Scene, int]]:
    return [(world.sample_training_scene(rng, world.FULL), -1)]


def _core(rng: world.Rng, index: int) -> list[tuple[world.Scene, int]]:
    return [(world.sample_training_scene(rng, world.CORE, pairs=0.04), -1)]


def _marked(rng: world.Rng, index: int) -> list[tuple[world.Scene, int]]:
    """Patterns and shades that captions name; a pair of subjects now and then, as in core."""
    if rng.random() < 0.04:
        return [(world.sample_training_scene(rng, world.CORE, pairs=1.0), -1)]
    return [(world.sample_marked_scene(rng, world.CORE), -1)]


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
    "marked": _marked,
    "same": _same,
    "odd": _odd,
}


def _chunk(job: tuple[str, int, int, int]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The first `wanted` pictures of a chunk: fewer are the beginning of more."""
    kind, number, seed, wanted = job
    rng = np.random.default_rng([seed, number])
    pixels: list[np.ndarray] = []
    facts: list[dict[str, Any]] = []
    marks = MARKS_TOLD if kind == "marked" else 0.0
    while len(facts) < wanted:
        for scene, individual in KINDS[kind](rng, number * CHUNK + len(facts)):
            pixels.append(np.asarray(world.render(scene, PIXELS)))
            facts.append(_facts(scene, rng, individual, marks))
    return np.stack(pixels[:wanted]), facts[:wanted]


def _rendered(
    jobs: list[tuple[str, int, int, int]], processes: int
) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
    if min(len(jobs), processes) < 2:
        yield from map(_chunk, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(_chunk, jobs)


def _known(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return found


def pictures(folder: Path, kind: str, count: int, seed: int, processes: int) -> Pictures:
    """Open the rendered set `kind` of `count` pictures, rendering what is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
    paths = [folder / f"{kind}-{i:04d}.json" for i in range(len(sizes))]
    facts = [_known(path) for path in paths]
    jobs = [(kind, i, seed, n) for i, n in enumerate(sizes) if len(facts[i]) < n]
    for done, ((_, i, _, _), (pixels, told)) in enumerate(
        zip(jobs, _rendered(jobs, processes), strict=True), 1
    ):
        np.save(paths[i].with_suffix(".npy"), pixels)
        # the facts come last and whole: with them there, the pictures are
        paths[i].with_suffix(".new").write_text(json.dumps(told))
        paths[i].with_suffix(".new").replace(paths[i])
        facts[i] = told
        print(f"pictures {kind}: {done}/{len(jobs)} files of at most {CHUNK}", flush=True)
    arrays = [np.load(p.with_suffix(".npy"))[:n] for p, n in zip(paths, sizes, strict=True)]
    return Pictures(
        np.concatenate(arrays),
        [f for part, n in zip(facts, sizes, strict=True) for f in part[:n]],
    )
