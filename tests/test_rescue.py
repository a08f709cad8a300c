"""What is saved, and what is told, where a run fails in its steps."""

from __future__ import annotations

import dataclasses
import math
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import assert_same
from test_steering import Spoil, assert_same_files, metrics, saved
from told import Told

import tunekit
from tunekit import runstate
from tunekit.errors import UserError
from tunekit.guards import TrainingError
from tunekit.progress import Silent

Tree = dict[str, dict[str, Any]]


class TestRescue:
    def test_a_cache_that_vanishes_names_the_picture_and_loses_nothing(
        self, tree: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train = {"steps": 6, "batch_size": 1, "checkpoint_every": 0, "sample_every": 0}
        recipe = tree(train=train)
        whole = tunekit.train(recipe, out=tmp_path / "whole", reporter=Silent())
        cache, out = tmp_path / "cache", tmp_path / "run"
        monkeypatch.setenv("TUNEKIT_CACHE", str(cache))
        with pytest.raises(UserError) as caught:
            tunekit.train(recipe, out=out, reporter=Spoil(2, lambda: shutil.rmtree(cache, True)))
        line = str(caught.value)
        assert "\n" not in line
        assert line[:6] in ("0.png:", "1.png:", "2.png:", "3.png:")
        assert "has vanished since the run began" in line
        assert line.endswith("step 2 is saved: the same command with --resume goes on")
        assert saved(out) == [2]
        state = runstate.read(out)
        assert state is not None
        assert (state.outcome, state.step) == ("failed", 2)
        assert state.error is not None
        assert str(tmp_path) not in state.error
        tunekit.train(recipe, out=out, reporter=Silent(), resume=True)
        shutil.rmtree(out / "checkpoints" / "step-000002")  # which the other run had no reason for
        assert_same(whole.folder, out)
        assert (runstate.read(out) or state).outcome == "finished"

    def test_a_guard_that_stops_the_run_leaves_the_step_before(
        self, tree: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The latents of one step are made infinite, as a broken file of a cache could be."""
        recipe = tree(train={"steps": 4, "checkpoint_every": 0, "sample_every": 0})
        spoil_step(monkeypatch, 2)
        with pytest.raises(TrainingError) as caught:
            tunekit.train(recipe, out=tmp_path / "run", reporter=Silent())
        line = str(caught.value)
        assert line.startswith("step 3 of 4: the loss is ")
        assert ', "a zorp robot ' in line
        assert line.endswith("; step 2 is saved: the same command with --resume goes on")
        assert caught.value.step == 3
        assert saved(tmp_path / "run") == [2]
        told = Told()
        finished = tunekit.train(
            recipe, ["train.on_nonfinite=skip"], out=tmp_path / "run", reporter=told, resume=True
        )
        assert any(note.startswith("step 3 of 4: the loss is") for note in told.notes)
        [skipped] = [line for line in metrics(finished.folder) if line.get("skipped")]
        assert (skipped["step"], skipped["loss"], skipped["grad_norm"]) == (3, None, None)
        assert finished.scores["run"]["steps_skipped"] == 1
        assert "1 of the steps were not taken: 3" in finished.report.read_text()
        straight = tunekit.train(
            recipe, ["train.on_nonfinite=skip"], out=tmp_path / "straight", reporter=Silent()
        )
        assert_same_files(finished, straight)

    @pytest.mark.parametrize("full", ["metrics.jsonl", "checkpoints/step-000002"])
    def test_a_full_disk_is_told_once(
        self, tree: Callable[..., Tree], tmp_path: Path, full: str
    ) -> None:
        """Whatever met it first: the line of a step, or its checkpoint, of which a try failed."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        logged = full == "metrics.jsonl"
        most = 100 if logged else 20_000
        filled = Spoil(1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard)))
        every = 0 if logged else 1
        recipe = tree(train={"checkpoint_every": every, "sample_every": 0, "steps": 3})
        try:
            with pytest.raises(UserError) as caught:
                tunekit.train(recipe, out=tmp_path / "run", reporter=filled)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        line = str(caught.value)
        assert line.startswith(f"{tmp_path / 'run' / full}: cannot be written: ")
        assert line.count("File too large") == 1
        assert line.count("step-000002") == (0 if logged else 1)
        assert logged == bool(
            re.search(r"; step 2 could not be saved either: \d+ bytes needed$", line)
        )
        assert not any("saved" in note for note in filled.notes)

    def test_a_disk_whose_room_changed_meanwhile_is_told_once(
        self, tree: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A real disk is not asked: how much it has free is what differs between two tries."""
        free = iter(range(1000, 2000))
        usage = shutil.disk_usage

        def shrunk(path: Any) -> Any:
            found = usage(path)
            return found._replace(free=next(free)) if filled.left <= 0 else found

        filled = Spoil(1, lambda: None)
        monkeypatch.setattr(shutil, "disk_usage", shrunk)
        recipe = tree(train={"checkpoint_every": 1, "sample_every": 0, "steps": 3})
        with pytest.raises(UserError) as caught:
            tunekit.train(recipe, out=tmp_path / "run", reporter=filled)
        assert next(free) > 1001, "it was tried once more"
        assert re.fullmatch(
            r"\S+/step-000002: cannot be written: \d+ bytes needed, and the disk has 1000 free; "
            "make room, or keep fewer checkpoints",
            str(caught.value),
        )

    def test_before_the_first_step_there_is_nothing_to_save(
        self, tree: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spoil_step(monkeypatch, 0)
        recipe = tree(train={"sample_every": 0})
        with pytest.raises(TrainingError, match=r"^step 1 of 4.*skip$"):
            tunekit.train(recipe, out=tmp_path / "run", reporter=Silent())
        assert saved(tmp_path / "run") == []

    def test_a_run_without_a_rate_stops_in_time(
        self, tree: Callable[..., Tree], tmp_path: Path
    ) -> None:
        still = tree(train={"learning_rate": 0.0, "steps": 60, "sample_every": 0})
        with pytest.raises(TrainingError, match="nothing that trains has moved in 20 steps"):
            tunekit.train(still, out=tmp_path / "run", reporter=Silent())
        assert len(metrics(tmp_path / "run")) == 20


def spoil_step(monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    """Hand out pictures that are no numbers in one step (0 is the first)."""
    from tunekit.preparation import Prepared

    batches = Prepared.batches

    def spoiled(self: Prepared, settings: Any, ranks: Any) -> Any:
        given = batches(self, settings, ranks)

        def rows(step: int, micro: int) -> Any:
            found = given(step, micro)
            if step != bad:
                return found
            return [
                dataclasses.replace(batch, latents=torch.full_like(batch.latents, math.inf))
                for batch in found
            ]

        return rows

    monkeypatch.setattr(Prepared, "batches", spoiled)
