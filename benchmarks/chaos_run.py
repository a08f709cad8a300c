"""The run that benchmarks/chaos.py disturbs: its recipe, its touches of files, and its outcome."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]  # the tiny models are those of the tests
FILE, SAVING = "at a file", "at a checkpoint"
STEPS = 12
_CHANGES = frozenset(
    f"os.{name}" for name in ("rename", "remove", "mkdir", "rmdir", "chmod", "utime", "truncate")
) | {"open", "shutil.rmtree"}


def version() -> str:
    """Return a fingerprint of the package and of these programs: what was run."""
    told = hashlib.sha256()
    for path in sorted((*(ROOT / "tunekit").rglob("*.py"), *(ROOT / "benchmarks").glob("chaos*"))):
        told.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return told.hexdigest()


def make_recipe(work: Path) -> dict[str, Any]:
    """Make base, judges and pictures in `work`, and return a recipe with much that is random."""
    import numpy as np
    import tiny
    import tiny_judges
    from PIL import Image

    rng = np.random.default_rng(0)
    (work / "pictures").mkdir()
    for number in range(5):
        blocks = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
        Image.fromarray(blocks).save(work / "pictures" / f"{number}.png")
        (work / "pictures" / f"{number}.txt").write_text(f"a zorp robot, red, {number}")
    return {
        "name": "chaos",
        "base": {"model": str(tiny.tiny_sd(work / "base"))},
        "data": {
            "source": str(work / "pictures"),
            "trigger": "zorp",
            "class": "robot",
            "captions": {"dropout": 0.3, "shuffle": True},
            "crop": "random",
            "flip": True,
        },
        "adapter": {"kind": "lora", "rank": 2, "dropout": 0.2},
        "train": {
            "steps": STEPS,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "schedule": "cosine",
            "ema": 0.9,
            "sample_every": 6,
            "checkpoint_every": 2,
            "keep_last": 3,
        },
        "evaluate": {
            "steps": 1,
            "prompts": ["a {trigger} {class}, red"],
            "seeds": [1],
            "clip": str(tiny_judges.tiny_clip(work / "clip")),
            "subject_encoder": str(tiny_judges.tiny_resnet(work / "encoder")),
        },
    }


def train(recipe: dict[str, Any], out: Path, cache: Path) -> None:
    """Train, or go on from what is saved."""
    import tunekit
    from tunekit import checkpoint
    from tunekit.progress import Silent

    os.environ["TUNEKIT_CACHE"] = str(cache)
    saved = bool(checkpoint.steps(out / "checkpoints"))
    tunekit.train(recipe, out=out, reporter=Silent(), resume=saved, overwrite=not saved)


class Touches:
    """Counts the files of a run and its cache that this process touches, and of its checkpoints.

    at: what is done at the n-th of each; (0, None) for nothing.
    """

    def __init__(self, folders: tuple[Path, ...], at: dict[str, tuple[int, Any]]) -> None:
        self.counts = {FILE: 0, SAVING: 0}
        self._folders, self._at = tuple(map(str, folders)), at
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in _CHANGES or not args or not isinstance(args[0], str | os.PathLike):
            return
        path = os.fspath(args[0])
        if not isinstance(path, str) or not path.startswith(self._folders):
            return
        for kind in (FILE, SAVING) if "/checkpoints/" in path else (FILE,):
            self.counts[kind] += 1
            at, act = self._at.get(kind, (0, None))
            if self.counts[kind] == at:
                act()


def facts(out: Path) -> dict[str, str]:
    """Return what two runs must have alike: a fingerprint of each by its name."""
    import numpy as np
    from PIL import Image

    from tunekit import checkpoint

    found = {}
    timed = ("seconds", "images_per_second", "memory_bytes")
    for number, line in enumerate((out / "metrics.jsonl").read_text().splitlines(), 1):
        told = {key: value for key, value in json.loads(line).items() if key not in timed}
        found[f"line {number} of metrics.jsonl"] = json.dumps(told)
    for folder in checkpoint.steps(out / "checkpoints"):
        checkpoint.verify(folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        found[folder.name] = json.dumps(manifest["files"], sort_keys=True)
    for path in sorted((out / "samples").rglob("*.png")):
        pixels = np.asarray(Image.open(path)).tobytes()
        found[str(path.relative_to(out))] = hashlib.sha256(pixels).hexdigest()
    for path in sorted((out / "export").glob("*.safetensors")):
        for name, tensor in checkpoint.read_safetensors(path)[0].items():
            told = hashlib.sha256(tensor.contiguous().view(-1).numpy().tobytes()).hexdigest()
            found[f"{name} of {path.name}"] = f"{tensor.dtype} {told}"
    scores = json.loads((out / "scores.json").read_text())
    return found | {"scores": json.dumps(scores["scores"], sort_keys=True)}
