"""A run holds one base in memory at a time, whatever it teaches: also to verify and to evaluate."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from held import memory_of
from PIL import Image

import tunekit
from tunekit import families, verification
from tunekit.export import ExportError
from tunekit.families import Family
from tunekit.loaded import VerificationError
from tunekit.progress import Silent
from tunekit.schema import Base

Folder = Callable[..., Path]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 2, "rank_dropout": 0.5, "text_encoder": True},
    "dora": {"kind": "lora", "rank": 2, "dora": True},
    "pissa": {"kind": "lora", "rank": 2, "init": "pissa"},
    "lokr": {"kind": "lokr", "rank": 2},
    "boft": {"kind": "boft", "block_size": 4},
    "full": {"kind": "full", "targets": "attention"},
}
WORD = {"name": "<zorp>", "vectors": 1, "init": "robot", "learning_rate": 0.1}


class Watch:
    """Counts, whenever a base is loaded, the weights of earlier ones that are still there."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self._seen: list[weakref.ref[Any]] = []
        self._load = families.load

    def __call__(self, base: Base, device: Any = "cpu") -> Family:
        gc.collect()
        self.held.append(sum(one() is not None for one in self._seen))
        family = self._load(base, device)
        self._seen += [one for part in family.components().values() for one in memory_of(part)]
        return family


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    made = Watch()
    monkeypatch.setattr(families, "load", made)
    return made


def recipe(folder: Path, pictures: Path, judges: dict[str, str], **more: Any) -> dict[str, Any]:
    return {
        "name": "one",
        "base": {"model": str(folder)},
        "data": {"source": str(pictures / "train"), "trigger": "zorp", "class": "robot"},
        "train": {"steps": 2, "learning_rate": 0.01},
        "evaluate": {"prompts": ["a {trigger}"], "seeds": [1], "steps": 1, **judges},
        "export": {"dtype": "fp32"},
        **more,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_to_train_to_verify_and_to_evaluate(
    kind: str,
    tiny_folder: Folder,
    pictures: Path,
    judges: dict[str, str],
    run_cache: None,
    watch: Watch,
    tmp_path: Path,
) -> None:
    tree = recipe(tiny_folder(), pictures, judges, adapter=KINDS[kind])
    if kind == "full":
        tree["tokens"] = [WORD]
        bare = tmp_path / "bare"  # without captions, so that the pictures are called by the word
        bare.mkdir()
        for path in (pictures / "train").glob("*.png"):
            shutil.copy(path, bare)
        tree["data"] = {"source": str(bare), "trigger": WORD["name"], "class": "robot"}
    run = tunekit.train(tree, out=tmp_path / "run", reporter=Silent())
    # to train with; for each file that is verified; untouched and taught, for the scores
    checks = {"lora": 2, "pissa": 2, "full": 3}.get(kind, 1)
    assert watch.held == [0] * (1 + checks + 2)
    assert len(run.files) == checks


def test_where_no_file_came_out(
    tiny_folder: Folder,
    pictures: Path,
    judges: dict[str, str],
    run_cache: None,
    watch: Watch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was learned is drawn from its checkpoint, as the last sample of the training was."""

    def wrong(*given: Any) -> Any:
        raise VerificationError("predicts as trained", "it is all wrong")

    monkeypatch.setattr(verification, "_compare_changes", wrong)
    tree = recipe(tiny_folder(), pictures, judges, adapter=KINDS["lora"])
    with pytest.raises(ExportError, match="it is all wrong"):
        tunekit.train(tree, out=tmp_path / "run", reporter=Silent())
    assert watch.held == [0] * 4
    assert (tmp_path / "run" / "report.html").is_file()
    names = [path.name for path in (tmp_path / "run" / "export").iterdir()]
    assert names == ["one-diffusers.safetensors.rejected"]
    samples = tmp_path / "run" / "samples"
    drawn = [samples / f"{who}_a-zorp_seed-1.png" for who in ("taught", "step-000002")]
    with Image.open(drawn[0]) as taught, Image.open(drawn[1]) as last:
        assert taught.tobytes() == last.tobytes()
