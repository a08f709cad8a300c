"""Every method at equal training time on the bundled base: the table of docs/methods.md.

    python benchmarks/methods.py [--only NAME ...] [--again NAME ...] [--seeds N] [--list]

Every method gets the time that recipes/character-lora.yaml takes for its 400 steps. The clock is
the processor time of one thread, as wall time says more about what else a machine does; and what
a step costs is measured beside the reference's own steps, in turns, so that a slow minute slows
both. Then the method trains in a process of its own, as many steps as fit, and is scored with the
file that came out. Drawing, encoding and the class's pictures of `data.prior` are not counted.

A row is written to benchmarks/results/methods.json when it is there, and docs/methods.md follows.
Rows of the same settings and the same bundled models are kept: what was stopped goes on. `--only`
looks at these methods alone, `--again` measures them afresh, and `--seeds 3` trains each with three
seeds, of which a row tells the mean. About five minutes a method and seed on one core; runs are
kept in runs/methods.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # before torch is imported: the clock is that of one thread
    os.environ["OMP_NUM_THREADS"] = "1"

from method_rows import METHODS, REFERENCE, ROOT, Method, in_order, table, written

from tunekit import toybox

if TYPE_CHECKING:
    from PIL.Image import Image

    from tunekit.evaluation.judges import Judges
    from tunekit.inference import Painter
    from tunekit.recipe import Recipe
    from tunekit.train import Loop, StepRecord

RESULT = ROOT / "benchmarks" / "results" / "methods.json"
PAGE = ROOT / "docs" / "methods.md"
WORK = ROOT / "runs" / "methods"

# Pictures without the trigger: of the class, and of what was not taught at all.
CLASS_SEEDS = tuple(range(1000, 1024))
OTHER_SEEDS = (1000, 1001)
OTHERS = (
    "a red cat in the forest, flat style",
    "a blue car at night, pixel art",
    "a green house in the snow, watercolour",
    "a yellow fish on the beach, flat style",
    "a purple star in the city, pixel art",
    "a black bird in the forest, watercolour",
    "a pink mushroom at night, flat style",
    "an orange ghost on the beach, pixel art",
)


def bundle() -> str:
    """Return a fingerprint of the bundled models: rows of other ones are not comparable."""
    digest = hashlib.sha256()
    for path in sorted(path for path in toybox.WEIGHTS.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(toybox.WEIGHTS)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def settings_key(method: Method) -> str:
    """Return a fingerprint of what decides a row, apart from its steps and the bundled models."""
    told = method.load().model_dump(mode="json", exclude_defaults=True)
    told["train"].pop("steps", None)
    text = json.dumps(told, sort_keys=True).replace(str(ROOT), ".")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# One process probes, another trains. What follows runs in these.

WARM, TURNS, TURN = 2, 8, 2  # steps not counted; turns, and steps in each


def steps_of(recipe: Recipe) -> Iterator[StepRecord]:
    """Yield a recipe's training steps, taken one by one, in memory."""
    from tunekit.preparation import prepare
    from tunekit.progress import Silent
    from tunekit.train import Loop

    ready = prepare(recipe, Silent())
    encode = ready.family.encode_prompt if ready.adapter.trains_text_encoder else None
    loop: Loop = Loop(ready.family, ready.adapter, recipe.train, encode=encode)
    return loop.run(ready.batches(recipe.train))


def probe(method: Method) -> dict[str, float]:
    """Return processor milliseconds a step, of the reference and of the method."""
    from tunekit.preparation import quietly

    spent: dict[str, list[float]] = {"reference": [], "own": []}
    with quietly():
        loops = {
            "reference": steps_of(Method("", REFERENCE).load()),
            "own": steps_of(method.load()),
        }
        for steps in loops.values():
            for _ in range(WARM):
                next(steps)
        for _ in range(TURNS):
            for name, steps in loops.items():
                began = time.process_time()
                for _ in range(TURN):
                    next(steps)
                spent[name].append((time.process_time() - began) / TURN)
    return {name: round(1000 * statistics.median(each), 2) for name, each in spent.items()}


@dataclass
class Clock:
    """Reports nothing, and takes the time of training: of its steps, not of what follows them."""

    marks: list[tuple[float, float]] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Say nothing."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[str], None]]:
        """Take the time at the begin of training and after each step."""
        training = name == "training"
        if training:
            self.marks.append((time.process_time(), time.perf_counter()))
        yield (
            lambda told="": (
                self.marks.append((time.process_time(), time.perf_counter())) if training else None
            )
        )

    def seconds(self) -> tuple[float, float]:
        """Return processor and wall seconds of all steps; the last, which saves, counts as any."""
        (processor, wall), (later, after) = self.marks[0], self.marks[-2]
        whole = (len(self.marks) - 1) / (len(self.marks) - 2)
        return (later - processor) * whole, (after - wall) * whole


def train(name: str, steps: int, seed: int) -> dict[str, Any]:
    """Train a method for so many steps and return what is measured of it."""
    import tunekit
    from tunekit.evaluation.judges import load_judges
    from tunekit.export import needed

    clock = Clock()
    recipe = METHODS[name].load(f"train.steps={steps}", f"train.seed={seed}")
    run = tunekit.train(recipe, out=WORK / f"{name}-{seed}", overwrite=True, reporter=clock)
    processor, wall = clock.seconds()
    last = (run.folder / "metrics.jsonl").read_text().splitlines()[-1]
    scores = run.scores["scores"]
    return {
        "seed": seed,
        "steps": steps,
        "likeness": {key: scores["likeness"][key] for key in ("closed", "closed_95")},
        "fidelity_change": scores["fidelity"]["change"],
        "leak": scores["leak"]["closed"],
        **others(recipe, run.folder, load_judges(recipe.evaluate)),
        "trained_numbers": run.scores["run"]["trained_numbers"],
        "file_bytes": sum(path.stat().st_size for path in needed(run.files)),
        "processor_seconds": round(processor, 1),
        "wall_seconds": round(wall, 1),
        "peak_memory_bytes": json.loads(last)["memory_bytes"],
    }


def others(recipe: Recipe, folder: Path, judges: Judges) -> dict[str, float | None]:
    """Return what became of pictures without the trigger.

    diversity: of "a CLASS" with many seeds, as a share of the base's own. drift: how far pictures
    of other things moved, as a share of the distance of the base's own with another seed.
    """
    from tunekit.evaluation import scores
    from tunekit.inference import load
    from tunekit.preparation import quietly

    plain = f"a {recipe.data.class_noun}"
    with quietly():
        before = gallery(recipe, load(recipe.base), kept=WORK / "base" / base_key(recipe))
        after = gallery(recipe, load(recipe.base, folder))
        rows = {
            who: (
                judges.likeness.embed_images([draw(plain, seed) for seed in CLASS_SEEDS]),
                judges.clip.embed_images([draw(p, seed) for p in OTHERS for seed in OTHER_SEEDS]),
            )
            for who, draw in (("before", before), ("after", after))
        }
    old, new = rows["before"][1], rows["after"][1]
    count = len(OTHER_SEEDS)
    spread = statistics.mean(
        scores.seed_spread(old[row : row + count]) or 0.0 for row in range(0, len(old), count)
    )
    return {
        "diversity": scores.diversity(rows["after"][0], rows["before"][0]),
        "drift": statistics.mean(scores.shift(new, old)) / spread,
    }


def base_key(recipe: Recipe) -> str:
    """Return what a base's own pictures are kept under."""
    told = [recipe.base.model_dump(mode="json", exclude_defaults=True), asdrawn(recipe), bundle()]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def asdrawn(recipe: Recipe) -> dict[str, Any]:
    """Return how pictures are drawn, as the recipe's evaluation draws them."""
    from tunekit.inference import DrawSettings

    evaluate = recipe.evaluate
    return asdict(DrawSettings(steps=evaluate.steps, guidance_scale=evaluate.guidance_scale))


def gallery(
    recipe: Recipe, painter: Painter, kept: Path | None = None
) -> Callable[[str, int], Image]:
    """Return (prompt, seed) -> picture; with `kept`, drawn once and read from there later."""
    from tunekit.data import open_rgb
    from tunekit.evaluation.measure import picture_name
    from tunekit.inference import DrawSettings, save_png

    settings = DrawSettings(**asdrawn(recipe))

    def draw(prompt: str, seed: int) -> Image:
        path = kept and kept / picture_name("base", prompt, seed)
        if path and path.exists():
            return open_rgb(path)
        drawn = next(painter.draw_many([prompt], [seed], settings))
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(drawn.image, path, drawn.settings)
        return drawn.image

    return draw


# What follows runs in the process that the user started.


def child(*words: str) -> dict[str, Any]:
    """Run this program in a fresh process and return what it measured."""
    done = subprocess.run(
        [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True
    )
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def begun(name: str) -> dict[str, Any]:
    """Return a row without runs: what the method is, and what a step of it costs."""
    method = METHODS[name]
    cost = {"reference": 1.0, "own": 1.0} if name == "lora" else child("--probe", name)
    told = {"title": method.title, "recipe": method.recipe, "changes": list(method.changes)}
    return told | {"settings": settings_key(method), "cost_of_a_step": cost, "runs": []}


def run(name: str, cost: Mapping[str, float], seed: int) -> dict[str, Any]:
    """Train a method with a seed for the steps that its time allows, and measure it."""
    budget = Method("", REFERENCE).load().train.steps
    steps = max(10, 10 * round(budget * cost["reference"] / cost["own"] / 10))
    return child("--train", name, "--steps", str(steps), "--seed", str(seed))


def save(rows: Mapping[str, Any], fingerprint: str) -> None:
    """Write the result and the page."""
    from tunekit.evaluation.facts import versions

    rows = in_order(rows)
    result = {"bundle": fingerprint, "versions": versions(), "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")


def recorded(fingerprint: str) -> dict[str, Any]:
    """Return the rows that were measured with these bundled models and settings."""
    if not RESULT.exists():
        return {}
    held = json.loads(RESULT.read_text())
    if held["bundle"] != fingerprint:
        print("the bundled models are others than those of the table: all rows are measured anew")
        return {}
    rows = in_order(held["rows"])
    changed = [n for n, one in rows.items() if one["settings"] != settings_key(METHODS[n])]
    if changed:
        print(f"other settings than in the table: {', '.join(changed)}")
    return {name: one for name, one in rows.items() if name not in changed}


def measure(only: Sequence[str], again: Sequence[str], seeds: int) -> int:
    """Measure what is missing; return the number of methods that failed."""
    fingerprint, failed = bundle(), 0
    rows = recorded(fingerprint)
    for name in again:
        rows.pop(name, None)
    wanted = [name for name in METHODS if name in (*only, *again) or not (only or again)]
    for name in wanted:
        try:
            row = rows[name] if name in rows else begun(name)
            done = {one["seed"] for one in row["runs"]}
            for seed in sorted({*range(seeds)} - done):
                row["runs"].append(run(name, row["cost_of_a_step"], seed))
                rows[name] = row
                save(rows, fingerprint)
        except subprocess.CalledProcessError as error:
            print(f"{name:18} failed with {error.returncode}, as told above", flush=True)
            failed += 1
            continue
        print(table({name: rows[name]})[-1], flush=True)
    if rows:
        save(rows, fingerprint)  # also where nothing was missing: the page may have been changed
    return failed


def main() -> int:
    """Do what the words say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = {"choices": list(METHODS), "metavar": "NAME", "nargs": "+", "default": []}
    parser.add_argument("--only", **known, help="look at these methods alone")
    parser.add_argument("--again", **known, help="measure these afresh")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds of each method")
    parser.add_argument("--list", action="store_true", help="name the methods")
    parser.add_argument("--probe", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--train", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{name:18} {method.title}" for name, method in METHODS.items()))
    elif options.probe:
        print(json.dumps(probe(METHODS[options.probe])))
    elif options.train:
        print(json.dumps(train(options.train, options.steps, options.seed)))
    else:
        return measure(options.only, options.again, options.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
