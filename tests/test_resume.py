"""A run that was stopped and goes on ends as if it had never been stopped, bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from told import KillAt, Killed, Told

import tunekit
from tunekit import checkpoint
from tunekit.errors import UserError
from tunekit.progress import Silent, Ticker
from tunekit.recipe import dump_yaml, recipe_from
from tunekit.run import Run

Tree = dict[str, dict[str, Any]]
STEPS = 6


def recipe(tree: Callable[..., Tree], **train: Any) -> Tree:
    settings = {"steps": STEPS, "checkpoint_every": 2, "sample_every": 3, **train}
    # Everything that is drawn by chance: dropped captions, dropout, crops, noise, timesteps.
    return tree(
        train=settings,
        data={"captions": {"dropout": 0.3}, "crop": "random", "flip": True},
        adapter={"kind": "lora", "rank": 2, "dropout": 0.2},
    )


@pytest.fixture(scope="module")
def whole(tree: Callable[..., Tree], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return the run that was never stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return tunekit.train(recipe(tree), out=out, reporter=Silent())


def curve(folder: Path) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["lr"], line["grad_norm"]) for line in lines]


def assert_same(one: Path, other: Path) -> None:
    assert curve(one) == curve(other)
    names = [path.name for path in checkpoint.steps(one / "checkpoints")]
    assert names == [path.name for path in checkpoint.steps(other / "checkpoints")]
    for name in names:
        a, b = (checkpoint.read(folder / "checkpoints" / name) for folder in (one, other))
        assert a.tensors.keys() == b.tensors.keys()
        for group, tensors in a.tensors.items():
            assert tensors.keys() == b.tensors[group].keys()
            for key, tensor in tensors.items():
                assert torch.equal(tensor, b.tensors[group][key]), (name, group, key)
    pictures = sorted(path.relative_to(one) for path in (one / "samples").rglob("*.png"))
    assert pictures == sorted(p.relative_to(other) for p in (other / "samples").rglob("*.png"))
    for path in pictures:
        drawn = [np.asarray(Image.open(folder / path)) for folder in (one, other)]
        assert np.array_equal(*drawn), path
    for file in (one / "export").glob("*.safetensors"):
        mine, _ = checkpoint.read_safetensors(file)
        yours, _ = checkpoint.read_safetensors(other / "export" / file.name)
        assert all(torch.equal(tensor, yours[key]) for key, tensor in mine.items())


@pytest.mark.parametrize("ticks", [[3], [2, 1, 2], [5]])
def test_killed_between_steps_and_resumed(
    tree: Callable[..., Tree], whole: Run, tmp_path: Path, ticks: list[int]
) -> None:
    out = tmp_path / "run"
    for number, tick in enumerate(ticks):
        with pytest.raises(Killed):
            tunekit.train(recipe(tree), out=out, reporter=KillAt(tick), resume=number > 0)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lock = {"pid": dead.pid, "host": socket.gethostname(), "since": "2026-01-02T03:04:05+00:00"}
    (out / ".lock").write_text(json.dumps(lock))  # as SIGKILL leaves it
    told = Told()
    finished = tunekit.train(recipe(tree), out=out, reporter=told, resume=True)
    assert any("went on from step-" in note for note in told.notes)
    assert any(f"the run before (process {dead.pid} on " in note for note in told.notes)
    assert_same(whole.folder, out)
    assert finished.scores["scores"] == whole.scores["scores"]


def test_killed_while_it_is_judged(tree: Callable[..., Tree], whole: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Killed):
        tunekit.train(recipe(tree), out=out, reporter=KillAt(2, "evaluating"))
    tunekit.train(recipe(tree), out=out, reporter=Silent(), resume=True)
    assert_same(whole.folder, out)
    with pytest.raises(UserError, match=r"nothing is left to train; raise train\.steps"):
        tunekit.train(recipe(tree), out=out, reporter=Silent(), resume=True)


def test_the_report_of_a_resumed_run_shows_the_whole_way(
    tree: Callable[..., Tree], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Killed):
        tunekit.train(recipe(tree), out=out, reporter=KillAt(5))
    tunekit.train(recipe(tree), out=out, reporter=Silent(), resume=True)
    text = (out / "report.html").read_text()
    assert "went on from step-000004" in text
    for step in (0, 3, 6):
        assert f"step {step}" in text.lower(), step


def test_an_earlier_checkpoint_can_be_taken(
    tree: Callable[..., Tree], whole: Run, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Killed):
        tunekit.train(recipe(tree), out=out, reporter=KillAt(5))
    tunekit.train(recipe(tree), out=out, reporter=Silent(), resume="step-000002")
    assert_same(whole.folder, out)


def test_killed_while_later_checkpoints_are_cleared_away(
    tree: Callable[..., Tree], whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Killed):
        tunekit.train(recipe(tree), out=out, reporter=KillAt(5))
    remove = shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        if "step-000004" in Path(path).name:
            (Path(path) / "adapter.safetensors").unlink()  # files go in no certain order
            raise Killed
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            tunekit.train(recipe(tree), out=out, reporter=Silent(), resume="step-000002")
    assert [path.name for path in checkpoint.steps(out / "checkpoints")] == ["step-000002"]
    tunekit.train(recipe(tree), out=out, reporter=Silent(), resume=True)
    assert_same(whole.folder, out)


def test_the_curve_is_on_the_disk_before_the_checkpoint(
    tree: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut too, a checkpoint stands beside every line up to its step."""
    out, sync = tmp_path / "run", os.fsync
    settled: dict[int, int] = {}
    lines = {2: 0, 4: 0, 6: 0}

    def synced(handle: int) -> None:
        sync(handle)
        settled[os.fstat(handle).st_ino] = os.fstat(handle).st_size
        for step in lines:
            partial = out / "checkpoints" / f".step-{step:06d}.partial" / "manifest.json"
            if partial.exists():
                metrics = out / "metrics.jsonl"
                known = metrics.read_bytes()[: settled[metrics.stat().st_ino]]
                lines[step] = known.count(b"\n")

    monkeypatch.setattr(os, "fsync", synced)
    with pytest.raises(Killed):
        tunekit.train(recipe(tree), out=out, reporter=KillAt(5))
    assert lines == {2: 2, 4: 4, 6: 0}


@pytest.fixture(scope="module")
def stopped(tree: Callable[..., Tree], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Killed):
        tunekit.train(recipe(tree), out=out, reporter=KillAt(5))
    return out


class TestRefused:
    def refusal(self, out: Path, changed: Tree, **options: Any) -> str:
        before = sorted(out.rglob("*"))
        with pytest.raises(UserError) as caught:
            tunekit.train(changed, out=out, reporter=Silent(), resume=True, **options)
        assert sorted(out.rglob("*")) == before
        return str(caught.value)

    def test_another_recipe_names_what_differs(
        self, tree: Callable[..., Tree], stopped: Path
    ) -> None:
        line = self.refusal(stopped, recipe(tree, learning_rate=0.5, seed=3))
        assert "train.learning_rate: 0.01 -> 0.5" in line
        assert "train.seed: 0 -> 3" in line
        assert "--allow-changed" in line

    def test_another_adapter_never_goes_on(self, tree: Callable[..., Tree], stopped: Path) -> None:
        changed = recipe(tree)
        changed["adapter"] = {**changed["adapter"], "rank": 3}
        line = self.refusal(stopped, changed, allow_changed=True)
        assert "cannot go on with another adapter.rank" in line

    def test_fewer_steps_than_are_done(self, tree: Callable[..., Tree], stopped: Path) -> None:
        shorter = recipe(tree, steps=3, checkpoint_every=1, sample_every=1)
        assert "step 4, and train.steps is 3" in self.refusal(stopped, shorter)

    def test_a_damaged_checkpoint_names_the_file_and_the_one_before(
        self, tree: Callable[..., Tree], stopped: Path
    ) -> None:
        path = stopped / "checkpoints" / "step-000004" / "adapter.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        try:
            line = self.refusal(stopped, recipe(tree))
        finally:
            path.write_bytes(whole)
        assert "step-000004/adapter.safetensors" in line
        assert "--resume" in line
        assert "step-000002" in line

    def test_the_checkpoint_offered_in_place_of_a_damaged_one_is_whole(
        self, tree: Callable[..., Tree], tmp_path: Path
    ) -> None:
        from tunekit.resume import find

        recipe = recipe_from(tree())
        (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
        parent = tmp_path / "checkpoints"
        for step in (999_998, 999_999, 1_000_000):
            tensors = {name: {"a": torch.ones(1)} for name in ("adapter", "optimizer")}
            checkpoint.save(parent / f"step-{step:06d}", tensors, {"step": step})
        for step in (999_999, 1_000_000):
            (parent / f"step-{step}" / "meta.json").write_text("{}")
        with pytest.raises(UserError, match=r"1000000/meta\.json.*is --resume .*/step-999998$"):
            find(tmp_path, None, recipe, False, finished=False)
        (parent / "step-999998" / "adapter.safetensors").unlink()
        with pytest.raises(UserError, match=r"1000000/meta\.json.*; none before it is whole$"):
            find(tmp_path, None, recipe, False, finished=False)

    @pytest.mark.parametrize("state", ["optimizer", "guards"])
    def test_a_checkpoint_without_all_of_its_state(
        self, tree: Callable[..., Tree], stopped: Path, state: str
    ) -> None:
        folder = stopped / "checkpoints" / "step-000004"
        manifest = json.loads((folder / "manifest.json").read_text())
        path = folder / f"{state}.safetensors"
        whole, kept = path.read_bytes(), (folder / "manifest.json").read_text()
        del manifest["files"][path.name]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        path.unlink()
        try:
            line = self.refusal(stopped, recipe(tree))
        finally:
            path.write_bytes(whole)
            (folder / "manifest.json").write_text(kept)
        assert f"has no {state} state" in line

    def test_what_was_saved_and_is_gone_does_not_begin_anew(
        self, tree: Callable[..., Tree], tmp_path: Path
    ) -> None:
        from tunekit.resume import find

        resolved = recipe_from(tree(train={"optimizer": "schedulefree_adamw"}))
        (tmp_path / "recipe.yaml").write_text(dump_yaml(resolved))
        tensors = {name: {"a": torch.ones(1)} for name in ("adapter", "optimizer", "guards")}
        for sets in (["adapter", "guards", "optimizer", "trained"], "trained", [1]):
            meta = {"step": 2, "sets": sets}
            checkpoint.save(tmp_path / "checkpoints" / "step-000002", tensors, meta)
            says = "has no trained state" if len(sets) == 4 else "does not say what was saved"
            with pytest.raises(UserError, match=says):
                find(tmp_path, None, resolved, False, finished=False)

    def test_where_nothing_was_saved(self, tree: Callable[..., Tree], tmp_path: Path) -> None:
        with pytest.raises(UserError, match="there is no such run folder"):
            tunekit.train(recipe(tree), out=tmp_path / "none", resume=True, reporter=Silent())


def test_more_steps_go_on(tree: Callable[..., Tree], tmp_path: Path) -> None:
    out = tmp_path / "run"
    tunekit.train(recipe(tree), out=out, reporter=Silent())
    longer = recipe(tree, steps=STEPS + 2)
    tunekit.train(longer, out=out, reporter=Silent(), resume=True)
    straight = tunekit.train(longer, out=tmp_path / "straight", reporter=Silent())
    assert curve(out) == curve(straight.folder)  # the schedule is constant


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_in_hand(
    tree: Callable[..., Tree], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "run"
    endless = recipe(tree, steps=100_000, checkpoint_every=0, sample_every=0)
    path.write_text(dump_yaml(recipe_from(endless)))
    command = [sys.executable, "-m", "tunekit", "train", str(path), "--out", str(out)]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command, stderr=log, stdout=subprocess.DEVNULL, env=os.environ)
    try:
        until = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() or len(curve_of(out)) < 3:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) == code
    finally:
        process.kill()
        log.close()
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said
    (saved,) = checkpoint.steps(out / "checkpoints")
    assert f"after step {int(saved.name[5:])} of" in said
    assert len(curve_of(out)) == int(saved.name[5:])
    checkpoint.verify(saved)


def curve_of(out: Path) -> list[str]:
    return (out / "metrics.jsonl").read_text().splitlines()


def own_pictures(tree: Callable[..., Tree], pictures: Path, to: Path) -> Tree:
    shutil.copytree(pictures, to)
    made = recipe(tree)
    made["data"] |= {"source": str(to / "train"), "holdout": str(to / "held_out")}
    return made


def test_other_pictures_are_named(
    tree: Callable[..., Tree], pictures: Path, tmp_path: Path
) -> None:
    mine = own_pictures(tree, pictures, tmp_path / "pictures")
    out, train = tmp_path / "run", tmp_path / "pictures" / "train"
    with pytest.raises(Killed):
        tunekit.train(mine, out=out, reporter=KillAt(5))
    Image.new("RGB", (40, 40), "red").save(train / "1.png")
    (train / "0.png").rename(train / "9.png")
    listed = (train / "metadata.jsonl").read_text().replace('"0.png"', '"9.png"')
    (train / "metadata.jsonl").write_text(listed)
    with pytest.raises(UserError) as caught:
        tunekit.train(mine, out=out, reporter=Silent(), resume=True)
    line = str(caught.value)
    assert "training, changed: 1.png" in line
    assert "training, gone: 0.png" in line
    assert "training, new: 9.png" in line
    assert "--allow-changed" in line
    tunekit.train(mine, out=out, reporter=Silent(), resume=True, allow_changed=True)
    assert len(curve(out)) == STEPS


class Remove(Silent):
    """Removes a folder at the first tick of training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Ticker]:
        def tick(told: str = "") -> None:
            if name == "training":
                shutil.rmtree(self.folder, ignore_errors=True)

        yield tick


def test_pictures_may_go_once_training_has_begun(
    tree: Callable[..., Tree], pictures: Path, whole: Run, tmp_path: Path
) -> None:
    mine = own_pictures(tree, pictures, tmp_path / "pictures")
    out = tmp_path / "run"
    tunekit.train(mine, out=out, reporter=Remove(tmp_path / "pictures"))
    assert not (tmp_path / "pictures").exists()
    assert_same(whole.folder, out)
    assert (out / "report.html").exists()
