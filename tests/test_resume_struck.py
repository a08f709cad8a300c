"""Whole runs struck in the middle of steps: pictures, curve, scores and files end the same."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed import EVERYTHING, draw_pictures, recipe_of
from test_resume import assert_same as assert_same_files
from told import KillAt, Killed

import tunekit
from tunekit import checkpoint
from tunekit.interrupts import Interrupted
from tunekit.progress import Silent
from tunekit.recipe import Recipe

Tree = dict[str, dict[str, Any]]


class Strike:
    """Does something at the n-th pass of training, counted over the process."""

    def __init__(self, at: int, act: Callable[[], None]) -> None:
        self.left, self.act = at, act

    def __call__(self, module: Any, args: Any) -> None:
        if type(module).__name__ == "UNet2DConditionModel" and torch.is_grad_enabled():
            self.left -= 1
            if self.left == 0:
                self.act()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        handle = torch.nn.modules.module.register_module_forward_pre_hook(self)
        try:
            yield
        finally:
            handle.remove()


def lost() -> None:
    raise OSError(5, "the disk went away")


def asked_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without what no two runs have alike."""
    timed = {"seconds", "images_per_second", "memory_bytes"}
    told = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in timed} for line in told]


RUNS: dict[str, tuple[Tree, int]] = {  # and how many passes a step has
    "everything": (EVERYTHING | {"train": EVERYTHING["train"] | {"sample_every": 2}}, 3),
    "the best of an average": (
        {
            "train": {
                "optimizer": "schedulefree_adamw",
                "learning_rate": 1e-2,
                "sample_every": 2,
                "checkpoint_every": 3,
                "keep_last": 1,
                "keep_best": True,
            }
        },
        1,
    ),
}


@pytest.fixture(scope="module")
def made(
    tree: Callable[..., Tree], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Recipe]:
    """Give a maker of recipes: what a way says, over a small run."""
    pictures = draw_pictures(tmp_path_factory.mktemp("drawn"))
    return partial(recipe_of, tree, pictures)


@pytest.mark.parametrize("name", RUNS)
def test_runs_struck_in_the_middle_of_steps(
    made: Callable[..., Recipe], tmp_path: Path, name: str
) -> None:
    """A disk error, a signal and a kill: each in a step, and each gone on from."""
    way, passes = RUNS[name]
    recipe, out = made(way), tmp_path / "run"
    whole = tunekit.train(recipe, out=tmp_path / "whole", reporter=Silent())
    with Strike(passes + 1, lost).listening(), pytest.raises(OSError, match="went away"):
        tunekit.train(recipe, out=out, reporter=Silent())
    assert [path.name for path in checkpoint.steps(out / "checkpoints")] == ["step-000001"]
    with Strike(passes, asked_to_stop).listening(), pytest.raises(Interrupted, match="step 2 of"):
        tunekit.train(recipe, out=out, reporter=Silent(), resume=True)
    with pytest.raises(Killed):
        tunekit.train(recipe, out=out, reporter=KillAt(3), resume=True)
    finished = tunekit.train(recipe, out=out, reporter=Silent(), resume=True)
    assert lines(whole.folder) == lines(out)
    assert finished.scores["scores"] == whole.scores["scores"]
    kept = {path.name for path in checkpoint.steps(whole.folder / "checkpoints")}
    for path in checkpoint.steps(out / "checkpoints"):
        if path.name not in kept:  # saved because it was struck
            checkpoint.verify(path)
            shutil.rmtree(path)
    (out / "metrics.jsonl").write_text("")
    (whole.folder / "metrics.jsonl").write_text("")
    assert_same_files(whole.folder, out)
