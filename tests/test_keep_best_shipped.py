"""`keep_best` on a recipe that is shipped, with the bundled base, judges and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import tunekit
from tunekit import checkpoint, keeping
from tunekit.progress import Silent

RECIPE = Path(__file__).parents[1] / "recipes" / "character-lora.yaml"
SHORT = (
    *("train.steps=6", "train.batch_size=2", "train.sample_every=2", "train.checkpoint_every=2"),
    *("train.keep_best=true", "train.keep_last=1", "train.learning_rate=0.02"),
    *("evaluate.seeds=[1]", "evaluate.steps=2", "export.layouts=[diffusers]"),
    'evaluate.prompts=["a {trigger} {class} in the snow, pixel art"]',
    "export.dtype=fp32",
)


def test_the_files_are_those_of_the_samples_most_like_the_real_pictures(
    tmp_path: Path, run_cache: None
) -> None:
    run = tunekit.train(RECIPE, SHORT, out=tmp_path / "run", reporter=Silent())
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    likeness = keeping.judged(lines)
    assert set(likeness) == {2, 4, 6}
    assert len(set(likeness.values())) == 3, "the judge tells them apart"
    best = max(likeness, key=lambda step: likeness[step])
    assert run.scores["run"]["step"] == best
    left = [checkpoint.step_of(path) for path in checkpoint.steps(run.folder / "checkpoints")]
    assert left == sorted({best, 6})
    saved = checkpoint.read(run.folder / "checkpoints" / f"step-{best:06d}").tensors["adapter"]
    wanted = sorted(hash(value.numpy().tobytes()) for value in saved.values())
    [file] = run.files
    tensors, _ = checkpoint.read_safetensors(file.path)
    found = sorted(hash(value.to(torch.float32).numpy().tobytes()) for value in tensors.values())
    assert found == wanted, "to the bit those of that step"
    assert f"the files are those of step {best}" in run.report.read_text()
