"""Whole runs on a tiny base: what they leave, what they refuse, and that they tell the truth."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from told import Told

import tunekit
from tunekit import checkpoint
from tunekit.errors import UserError
from tunekit.export import ExportError
from tunekit.inference import DrawSettings, load, read_settings
from tunekit.progress import Silent, Ticker
from tunekit.recipe import load_recipe
from tunekit.run import Run
from tunekit.runwriter import OURS, RunWriter

Tree = dict[str, dict[str, Any]]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_leaves_everything_in_its_folder(run: Run) -> None:
    held = {path.name for path in run.folder.iterdir()}
    assert held == OURS
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0].keys() >= {"loss", "lr", "grad_norm", "images_per_second", "memory_bytes"}
    assert list((run.folder / "tb").glob("events.*"))
    steps = checkpoint.steps(run.folder / "checkpoints")
    assert [folder.name for folder in steps] == [f"step-00000{i}" for i in (1, 2, 3, 4)]
    assert checkpoint.read(steps[-1]).meta["step"] == 4
    samples = {path.name for path in (run.folder / "samples").iterdir()}
    assert {"step-000000.png", "step-000002.png", "step-000004.png"} < samples
    assert "step-000004_a-zorp-robot_red_seed-1.png" in samples
    assert "taught_a-zorp-robot_red_seed-1.png" in samples
    assert "base_a-robot_red_seed-1.png" in samples
    shown = read_settings(run.folder / "samples" / "before-after.png")
    assert shown["prompts"] == ["a robot, red", "a zorp robot, red"]
    assert run.files[0].path.is_file()
    assert "| subject likeness |" in (run.folder / "export" / "README.md").read_text()


def test_the_recipe_it_leaves_is_the_one_it_ran(run: Run) -> None:
    assert load_recipe(run.folder / "recipe.yaml") == run.recipe


def test_scores_stand_in_json_with_the_pictures_they_belong_to(run: Run) -> None:
    told = json.loads((run.folder / "scores.json").read_text())
    assert told == json.loads(json.dumps(run.scores))
    assert told["schema_version"] == 1
    assert told["run"]["peak_memory_bytes"] > 1e8
    assert told["run"]["versions"]["tunekit"] == tunekit.__version__
    assert set(told["run"]["seconds"]) == {"preparing", "training", "exporting", "evaluating"}
    for row in told["prompts"][0]["pictures"]:
        assert (run.folder / row["file"]).is_file()
        assert (run.folder / row["base_file"]).is_file()
        assert row["nearest"] in {"0.png", "1.png", "2.png", "3.png"}


def test_the_report_says_what_the_scores_say(run: Run) -> None:
    page = run.report.read_text()
    assert run.scores["verdict"]["headline"] in page
    assert run.files[0].path.name in page
    assert "verified" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert run.as_dict()["report"] == str(run.report)
    assert run.lines()[0] == run.scores["verdict"]["headline"]
    json.dumps(run.as_dict(), allow_nan=False)


def test_samples_are_what_is_drawn_later_from_the_checkpoint(run: Run) -> None:
    settings = DrawSettings(steps=2, guidance_scale=5.0)
    for step in (2, 4):
        kept = run.folder / "samples" / f"step-00000{step}_a-zorp-robot_red_seed-1.png"
        stored = read_settings(kept)
        painter = load(run.recipe.base, [run.folder / "checkpoints" / f"step-00000{step}"])
        drawn = painter.draw(str(stored["prompt"]), 1, settings)
        assert np.array_equal(np.asarray(drawn), np.asarray(Image.open(kept)))
    kept = run.folder / "samples" / "taught_a-zorp-robot_red_seed-1.png"
    drawn = load(run.recipe.base, [run.folder]).draw("a zorp robot, red", 1, settings)
    assert np.array_equal(np.asarray(drawn), np.asarray(Image.open(kept)))


def test_the_same_recipe_gives_the_same_run(
    run: Run, tree: Callable[..., Tree], tmp_path: Path
) -> None:
    told = Told()
    again = tunekit.train(tree(), out=tmp_path / "again", reporter=told)
    assert again.files[0].parity == run.files[0].parity
    for name in ("scores", "prompts", "verdict"):
        assert again.scores[name] == run.scores[name]
    kept = sorted(path.name for path in (run.folder / "samples").iterdir())
    assert kept == sorted(path.name for path in (again.folder / "samples").iterdir())
    for name in kept:
        one, other = (np.asarray(Image.open(r.folder / "samples" / name)) for r in (run, again))
        assert np.array_equal(one, other), name
    assert len(told.ticks["training"]) == 4
    assert re.match(r"loss \d.*lr .* images/s, ", told.ticks["training"][0])
    assert told.ticks["exporting"] == ["verified"]
    assert any("4 pictures of 40x40" in note for note in told.notes)


def test_overwriting_is_asked_for(run: Run, tree: Callable[..., Tree], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run.folder, folder)
    before = files(folder)
    with pytest.raises(UserError, match=r"holds a finished run; --overwrite replaces it"):
        tunekit.train(tree(), out=folder, reporter=Silent())
    (folder / "report.html").unlink()
    with pytest.raises(UserError, match=r"an unfinished run \(its last checkpoint is step-000004"):
        tunekit.train(tree(), out=folder, reporter=Silent())
    assert files(folder) == {k: v for k, v in before.items() if k != "report.html"}
    less = tree(train={"steps": 1, "sample_every": 0})
    tunekit.train(less, ["train.batch_size=1"], out=folder, overwrite=True, reporter=Silent())
    assert [p.name for p in checkpoint.steps(folder / "checkpoints")] == ["step-000001"]
    assert not (folder / "samples" / "step-000000.png").exists()


def test_what_no_run_wrote_is_never_touched(tree: Callable[..., Tree], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    (tmp_path / "recipe.yaml").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds thesis.tex, which no run wrote"):
            tunekit.train(tree(), out=tmp_path, overwrite=overwrite, reporter=Silent())
    assert files(tmp_path) == {"thesis.tex": b"x", "recipe.yaml": b"x"}
    with pytest.raises(UserError, match="is a file; name a folder"):
        tunekit.train(tree(), out=tmp_path / "thesis.tex", reporter=Silent())
    with pytest.raises(UserError, match="is a file, so no folder can be made in it"):
        tunekit.train(tree(), out=tmp_path / "thesis.tex" / "run", reporter=Silent())


def test_two_runs_cannot_share_a_folder(tree: Callable[..., Tree], tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run")
    with writer.claim(overwrite=False):
        for overwrite in (False, True):
            with pytest.raises(UserError, match=rf"another run is writing .*process {os.getpid()}"):
                tunekit.train(tree(), out=writer.path, overwrite=overwrite, reporter=Silent())
    writer.check(overwrite=False)  # given back, and empty but for the lock file
    with (writer.path / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"source": "EMPTY", "holdout": None}}, r"picture"),
        ({"data": {"holdout": "BROKEN"}}, r"bad\.png"),
        ({"base": {"model": "EMPTY"}}, r"no model_index\.json"),
        ({"evaluate": {"clip": "EMPTY"}}, r"CLIP .* cannot be loaded"),
        ({"evaluate": {"subject_encoder": "EMPTY"}}, r"subject encoder .* cannot be loaded"),
        ({"evaluate": {"prompts": ["a {trigger}" + " very" * 30]}}, r"longer than the 24 tokens"),
        ({"evaluate": {"scheduler": "DPMSolverSDEScheduler2"}}, r"scheduler"),
        ({"evaluate": {"negative_prompt": "blur", "guidance_scale": 1.0}}, r"negative_prompt"),
        ({"data": {"resolution": 36}}, r"resolution"),
        ({"data": {"holdout": "COPY"}}, r"held-out pictures that are training pictures as well"),
        ({"adapter": {"targets": ["nowhere"]}}, r"nowhere"),
        pytest.param(
            {"train": {"precision": "fp16"}},
            r"train\.precision: fp16 needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains in fp16"),
        ),
    ],
)
def test_what_can_be_known_beforehand_leaves_nothing_behind(
    sections: Tree, message: str, tree: Callable[..., Tree], pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(pictures / "train", tmp_path / "copy")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "bad.png").write_bytes(b"<html>")
    for values in sections.values():
        for key, value in values.items():
            if value in ("EMPTY", "BROKEN", "COPY"):
                values[key] = str(tmp_path / value.lower())
    with pytest.raises(UserError, match=message):
        tunekit.train(tree(**sections), out=tmp_path / "out" / "run", reporter=Silent())
    assert not (tmp_path / "out").exists()


def test_too_little_room_is_said_beforehand(
    tree: Callable[..., Tree], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(UserError, match=r"needs about \d+ MB and the disk has 1 MB free"):
        tunekit.train(tree(), out=tmp_path / "run", reporter=Silent())
    many = tree(train={"steps": 100_000, "checkpoint_every": 1})
    with pytest.raises(UserError) as caught:
        tunekit.train(many, out=tmp_path / "run", reporter=Silent())
    said = re.search(r"needs about ([\d,]+) MB", str(caught.value))
    assert said is not None
    files = (run.folder / "checkpoints" / "step-000004").iterdir()
    one = sum(path.stat().st_size for path in files)
    # What describes them is reckoned with longer names; test_space.py says how near it comes.
    assert one <= int(said[1].replace(",", "")) * 1e6 / 100_000 <= one + 200_000
    assert not (tmp_path / "run").exists()


def test_without_learning_the_score_does_not_move_and_the_report_says_so(
    tree: Callable[..., Tree], tmp_path: Path
) -> None:
    still = tree(train={"learning_rate": 0.0, "steps": 1, "sample_every": 0})
    with pytest.raises(ExportError, match="nothing was learned"):
        tunekit.train(still, out=tmp_path / "run", reporter=Silent())
    told = json.loads((tmp_path / "run" / "scores.json").read_text())
    leak, shift = told["scores"]["leak"], told["scores"]["shift"]
    assert leak["score"] == leak["floor"]
    assert shift["score"] == pytest.approx(0, abs=1e-6)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "no adapter file came out" in page
    assert "It learned" not in page


def test_an_interrupted_run_keeps_its_checkpoints_and_is_not_taken_for_finished(
    tree: Callable[..., Tree], tmp_path: Path
) -> None:
    class Impatient(Told):
        def note(self, text: str) -> None:
            pass

        @contextlib.contextmanager
        def stage(self, name: str, total: int) -> Iterator[Ticker]:
            def tick(words: str = "") -> None:
                done.append(name)
                if done.count("training") == 2:
                    raise KeyboardInterrupt

            done: list[str] = []
            yield tick

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        tunekit.train(tree(train={"sample_every": 0}), out=folder, reporter=Impatient())
    assert checkpoint.read(checkpoint.steps(folder / "checkpoints")[-1]).meta["step"] == 2
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    with pytest.raises(UserError, match=r"an unfinished run \(its last checkpoint is step-000002"):
        RunWriter(folder).check(overwrite=False)  # and the lock is given back


def test_a_style_a_text_encoder_and_nothing_held_out(
    tree: Callable[..., Tree], tmp_path: Path
) -> None:
    recipe = tree(
        data={"holdout": None, "class": "style"},
        adapter={"text_encoder": True},
        train={"steps": 1, "sample_every": 1, "text_encoder_learning_rate": 1e-2},
        evaluate={"kind": "style", "prompts": ["a cat, {trigger} {class}"]},
    )
    run = tunekit.train(recipe, out=tmp_path / "run", reporter=Silent())
    assert run.scores["kind"] == "style"
    assert run.scores["scores"]["likeness"]["ceiling_from"] == "training pictures"
    assert run.scores["scores"]["leak"]["prompts"] == ["a cat, style"]
    trained = checkpoint.read(run.folder / "checkpoints" / "step-000001").tensors["adapter"]
    assert any(name.startswith("text_encoder.") for name in trained)


def test_a_launcher_of_several_processes_is_refused(
    tree: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started"):
        tunekit.train(tree(), out=tmp_path / "run", reporter=Silent())
    assert not (tmp_path / "run").exists()
