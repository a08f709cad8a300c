"""Pretraining: stages go on exactly where they stopped, and the whole program runs from nothing."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tunekit import toybox
from tunekit.toybox import world
from tunekit.toybox.pretrain import __main__ as program
from tunekit.toybox.pretrain import attributes, common, judge
from tunekit.toybox.pretrain.assemble import assemble, unpack
from tunekit.toybox.pretrain.clip import shift
from tunekit.toybox.pretrain.pictures import Pictures, pictures
from tunekit.toybox.pretrain.unet import save_running


class StoppedError(Exception):
    """Stands for a power cut."""


@pytest.fixture
def saving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every stage save after each step: each look at the clock is an hour later."""
    hours = itertools.count(0, 3600)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(hours)))


def train_tiny(folder: Path, steps: int, stop: int | None = None) -> dict[str, torch.Tensor]:
    """Train a small net with a convolution, a matrix, a norm and biases; gives all it leaves."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 8), nn.LayerNorm(8)
    )
    stage = common.Stage(folder, {"net": net}, common.Frugal([net], lr=1e-2), steps, warmup=2,
                         ema=0.9)  # fmt: skip

    def step(number: int) -> dict[str, torch.Tensor]:
        if number == stop:
            raise StoppedError
        generator = torch.Generator().manual_seed(number)
        return {"loss": net(torch.randn(5, 2, 8, 8, generator=generator)).square()[:, 0].mean()}

    stage.run(step, 5)
    return load_file(folder / "state.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.usefixtures("saving")
@pytest.mark.parametrize("stop", [1, 4])
def test_an_interrupted_stage_ends_as_if_it_had_not_been(tmp_path: Path, stop: int) -> None:
    whole = train_tiny(tmp_path / "whole", 7)
    with pytest.raises(StoppedError):
        train_tiny(tmp_path / "cut", 7, stop)
    assert not torch.equal(
        load_file(tmp_path / "cut" / "state.safetensors")["module.net.3.weight"],
        whole["module.net.3.weight"],
    )
    same(train_tiny(tmp_path / "cut", 7), whole)
    lines = (tmp_path / "cut" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 8))


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    done = train_tiny(tmp_path, 3)
    same(train_tiny(tmp_path, 3, stop=0), done)  # would raise if a step were taken


def test_every_picture_comes_once_an_epoch_in_a_new_order() -> None:
    drawn = [list(common.batches(10, 4, step, seed=3)) for step in range(5)]
    flat = [i for batch in drawn for i in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert drawn[3] == list(common.batches(10, 4, 3, seed=3)), "a step's batch hangs on it alone"


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pictures]:
    folder = tmp_path_factory.mktemp("pictures")
    return folder, pictures(folder, "full", 1000, 11, 1)


@pytest.mark.usefixtures("saving")
def test_the_judge_resumes_exactly(
    tmp_path: Path, thousand: tuple[Path, Pictures], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = thousand[1]
    judge.train_judge(tmp_path / "whole", data, 4, batch=16)
    real = shift

    def cut(pixels: torch.Tensor, number: int, seed: int) -> torch.Tensor:
        if number == 2:
            raise StoppedError
        return real(pixels, number, seed)

    monkeypatch.setattr(judge, "shift", cut)
    with pytest.raises(StoppedError):
        judge.train_judge(tmp_path / "cut", data, 4, batch=16)
    monkeypatch.setattr(judge, "shift", real)
    judge.train_judge(tmp_path / "cut", data, 4, batch=16)
    for name in ("judge/model.safetensors", "judge-training/state.safetensors"):
        same(load_file(tmp_path / "cut" / name), load_file(tmp_path / "whole" / name))


def test_pictures_are_rendered_once_and_fewer_are_the_first_of_more(
    thousand: tuple[Path, Pictures], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = thousand
    few = pictures(tmp_path, "full", 12, 11, 1)
    assert np.array_equal(few.pixels, data.pixels[:12])
    assert few.facts == data.facts[:12]
    more = pictures(tmp_path, "full", 20, 11, 1)  # the set grows
    assert np.array_equal(more.pixels, data.pixels[:20])
    assert more.facts == data.facts[:20]

    def never(scene: world.Scene, size: int = 64) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr(world, "render", never)
    assert pictures(folder, "full", 1000, 11, 1).facts == data.facts


def test_pictures_of_an_individual_come_in_fours(tmp_path: Path) -> None:
    facts = pictures(tmp_path, "same", 16, 13, 1).facts
    names = [f["individual"] for f in facts]
    assert len(set(names)) == 4
    assert all(len(set(names[i : i + 4])) == 1 for i in range(0, 16, 4))
    assert all(len({f["subject"] for f in facts[i : i + 4]}) == 1 for i in range(0, 16, 4))


def test_the_attribute_stage_never_sees_what_is_held_out(thousand: tuple[Path, Pictures]) -> None:
    chosen = attributes.select(thousand[1])
    assert 0 < len(chosen) < 1000
    assert all(f["figures"] == 1 for f in chosen.facts)
    assert not any(world.held_out(tuple(f[k] for k in attributes.WORDS)) for f in chosen.facts)


def test_captions_of_all_combinations_are_in_the_order_of_their_labels() -> None:
    for wording in attributes.WORDINGS:
        told = attributes.captions(wording)
        assert len(told) == len(set(told)) == 9600
        number = int(np.ravel_multi_index((5, 1, 4, 2), attributes.SHAPE))
        assert "an orange cat" in told[number]
        assert any(phrase in told[number] for phrase in world.PLACE_WORDS["night"])
        assert "watercolour" in told[number]


def test_accuracy_counts_what_is_right() -> None:
    """With each caption for its own picture all is right; with a wrong colour only that is not."""
    generator = torch.Generator().manual_seed(1)
    texts = nn.functional.normalize(torch.randn(9600, 64, generator=generator), dim=-1)
    found = torch.stack([torch.randint(0, n, (30,), generator=generator)
                         for n in attributes.SHAPE], 1)  # fmt: skip
    numbers = torch.from_numpy(np.ravel_multi_index(found.T.numpy(), attributes.SHAPE))
    told = attributes.accuracy(texts[numbers], texts, found)
    assert set(told["joint"].values()) == {100.0}
    assert set(told["given"].values()) == {100.0}
    wrong = found.clone()
    wrong[:, 1] = (wrong[:, 1] + 1) % 10
    assert attributes.accuracy(texts[numbers], texts, wrong)["joint"] == {
        "subject": 100.0, "colour": 0.0, "place": 100.0, "style": 100.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("begun", "asked"), [("0.5", ["--scale", "0.25"]), (None, ["--scale", "0.25"])]
)
def test_runs_of_two_scales_are_not_mixed(
    tmp_path: Path, begun: str | None, asked: list[str]
) -> None:
    name = "scale.txt" if begun else "older-checkpoint"
    (tmp_path / name).write_text(begun or "")
    with pytest.raises(SystemExit, match="was begun at --scale"):
        program.main(["--work", str(tmp_path), "--target", str(tmp_path / "t"), *asked])


def test_a_trial_run_never_replaces_the_shipped_weights(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="give it a --target"):
        program.main(["--work", str(tmp_path), "--scale", "0.25"])


def test_shipped_parts_that_no_stage_touched_are_shipped_again_bit_by_bit(tmp_path: Path) -> None:
    unpack(tmp_path / "work")
    assert not save_running(tmp_path / "work"), "no stage of the denoiser was begun"
    assemble(tmp_path / "work", tmp_path / "weights")
    shipped = {p.relative_to(toybox.WEIGHTS): p for p in toybox.WEIGHTS.rglob("*.safetensors")}
    again = tmp_path / "weights"
    assert {p.relative_to(again) for p in again.rglob("*.safetensors")} == set(shipped)
    for name, file in shipped.items():
        same(load_file(again / name), load_file(file))


# About 40 seconds of one processor; where many tests share it, several minutes.
whole = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """All stages from nothing, with a thousandth of the pictures and steps."""
    root = tmp_path_factory.mktemp("toybox")
    run(root)
    return root / "work", root / "weights"


def run(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tunekit.toybox.pretrain", "--scale", "0.001",
         "--work", str(root / "work"), "--target", str(root / "weights"), *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@whole
def test_the_whole_toybox_is_made_from_nothing(made: tuple[Path, Path]) -> None:
    from diffusers import StableDiffusionPipeline

    from tunekit.evaluation.embedders import Clip, SubjectEncoder

    work, weights = made
    pipeline = StableDiffusionPipeline.from_pretrained(weights / "model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red cat in the forest, watercolour", num_inference_steps=2).images[0]
    assert image.size == (64, 64)
    assert np.asarray(image).std() > 0
    assert Clip.load(str(weights / "clip")).embed_texts(["a red cat"]).shape == (1, 128)
    assert SubjectEncoder.load(str(weights / "subject")).embed_images([image]).shape == (1, 256)
    table: dict[str, Any] = json.loads((work / "assessment.json").read_text())
    assert set(table["drawn"]) == {"subject", "colour", "place", "style"}
    assert (work / "sheet.png").exists()
    shipped = program.STEPS
    for stage in ("clip", "vae", "judge", "subject", "clip-vision", "clip-attributes", "unet",
                  "unet-marks"):  # fmt: skip
        lines = (work / f"{stage}-training" / "log.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == max(1, round(shipped[stage] / 1000))


@whole
def test_the_marks_are_learned_by_the_denoiser_as_it_stands(made: tuple[Path, Path]) -> None:
    """The stage goes on from the one before it, and its own result is what ships."""
    work, weights = made
    states = [load_file(work / f"{name}-training" / "state.safetensors")
              for name in ("unet", "unet-marks")]  # fmt: skip
    shipped = load_file(weights / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    moved = 0.0
    for name, tensor in shipped.items():
        before, after = (state[f"average.unet.{name}"] for state in states)
        assert torch.equal(tensor, after.half()), name
        moved = max(moved, float((after - before).abs().max()))
    # one step of it; from other first weights they would be far apart
    assert 0 < moved < 0.05


@whole
def test_no_stage_touches_the_text_tower_after_the_first(made: tuple[Path, Path]) -> None:
    """The denoiser reads with the tower that came out of stage clip; later stages keep it."""
    work, weights = made
    first = load_file(work / "clip-training" / "state.safetensors")
    text = load_file(weights / "model" / "text_encoder" / "model.safetensors")
    clip = load_file(weights / "clip" / "model.safetensors")
    for name, tensor in text.items():
        assert torch.equal(tensor, first[f"average.clip.{name}"].half()), name
        assert torch.equal(tensor, clip[name]), name


@whole
def test_a_lost_part_is_made_again_as_it_was(made: tuple[Path, Path]) -> None:
    """The last checkpoint of a finished stage is enough to write its part again."""
    work, weights = made
    file = weights / "judge" / "model.safetensors"
    before = file.read_bytes()
    shutil.rmtree(work / "judge")
    file.unlink()
    out = run(work.parent, "--only", "judge", "--only", "assemble")
    assert "judge-training: goes on at step 1" in out
    assert file.read_bytes() == before
