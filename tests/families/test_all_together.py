"""What no other test has on every family: masks, a prior, new words and a base in few bits.

All of it in one run, from the recipe to files that are verified and drawn with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from resumed import draw_pictures

import tunekit
from tunekit import families, quantize
from tunekit.progress import Silent

Tree = dict[str, dict[str, Any]]


@pytest.mark.parametrize("name", families.names())
def test_masks_prior_words_and_few_bits_in_one_run(
    name: str,
    tree: Callable[..., Tree],
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantize, "LEAST", 1024)  # what pays in a tiny model
    (tmp_path / "pictures").mkdir()
    step = families.get(name).size_multiple
    data = {
        "source": str(draw_pictures(tmp_path / "pictures")),
        "holdout": None,
        "trigger": "<zorp>",
        "captions": {"trigger": "insert"},
        "buckets": {"step": step},
        "resolution": 32,
        "mask": {"background_weight": 0.2},
        "prior": {"count": 2, "steps": 1},
    }
    recipe: dict[str, Any] = tree(data=data, train={"steps": 2, "sample_every": 0})
    recipe["base"] = {"model": str(tiny_folder(name)), "quantize": "int8"}
    recipe["adapter"] = {"kind": "lora", "rank": 2, "text_encoder": True}
    recipe["tokens"] = [{"name": "<zorp>", "vectors": 2, "init": "robot", "learning_rate": 0.1}]
    recipe["export"] = {"dtype": "fp32"}
    run = tunekit.train(recipe, out=tmp_path / "run", reporter=Silent())
    assert [file.layout for file in run.files] == ["diffusers", "kohya", "words", "bundle"]
    assert all(file.parity.change > 1e-6 for file in run.files)
    assert "held as int8" in run.report.read_text()
    first = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["prior_loss"] > 0
    assert first["loss"] > 0
    painter = tunekit.load(run.folder)
    taught = painter.draw("a {trigger}", seed=1).tobytes()
    painter.swap([])
    assert painter.draw("a robot", seed=1).tobytes() != taught
