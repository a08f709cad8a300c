"""What a recipe's keys promise of a run, seen in what it leaves, says and holds in memory."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import re
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from told import Told
from torch import nn

import tunekit
from tunekit.inference import DrawSettings, load, read_settings
from tunekit.preparation import prepare
from tunekit.progress import Silent, Ticker
from tunekit.recipe import recipe_from
from tunekit.run import Run

Tree = dict[str, dict[str, Any]]
WATCHED = ("UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel")
LONG = "a zorp robot on the beach, a small red house in the snow at night and a yellow duck"


def living() -> list[nn.Module]:
    """Return the base models that are in memory."""
    return [thing for thing in gc.get_objects() if type(thing).__name__ in WATCHED]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def metrics(run: Run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def board(run: Run) -> Any:
    """Return what TensorBoard reads from a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run.folder / "tb")).Reload()


class Watcher(Silent):
    """Writes down, at each tick, which models this run holds in memory."""

    def __init__(self) -> None:
        self.held: dict[str, list[list[str]]] = {}
        self.trained: set[weakref.ref[nn.Module]] = set()
        self.outlived: list[str] = []
        self._others = living()

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Ticker]:
        def tick(words: str = "") -> None:
            here = [one for one in living() if not any(one is other for other in self._others)]
            self.held.setdefault(name, []).append(sorted(type(one).__name__ for one in here))
            if name == "training":
                self.trained |= {weakref.ref(one) for one in here}
            if name == "evaluating":
                left = [one() for one in self.trained]
                self.outlived += [type(one).__name__ for one in left if one is not None]

        yield tick


@pytest.fixture(scope="module")
def watched(tree: Callable[..., Tree], tmp_path_factory: pytest.TempPathFactory) -> Watcher:
    """Return what the models did in memory during a run that draws samples at step 0, 2 and 4."""
    watcher = Watcher()
    out = tmp_path_factory.mktemp("watched") / "run"
    tunekit.train(tree(), out=out, reporter=watcher)
    assert len(list((out / "samples").glob("step-00000?.png"))) == 3
    return watcher


def test_what_does_not_train_leaves_memory_while_the_loop_runs(watched: Watcher) -> None:
    assert {"AutoencoderKL", "CLIPTextModel"} < set(watched.held["encoding"][-1])
    # Steps 2 and 4 drew samples, with the VAE and the text encoder loaded again for them.
    assert watched.held["training"] == [["UNet2DConditionModel"]] * 4


def test_what_was_trained_makes_room_for_what_is_judged(watched: Watcher) -> None:
    assert watched.trained
    assert watched.outlived == []
    held = watched.held["evaluating"]
    # The base alone, and then what was taught alone.
    assert [names.count("UNet2DConditionModel") for names in held] == [1] * len(held)


@pytest.fixture(scope="module")
def unusual(
    tree: Callable[..., Tree], pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Told]:
    """Return a run with a scheduler of its own, few log lines and a long caption; and its notes."""
    folder = tmp_path_factory.mktemp("unusual")
    shutil.copytree(pictures / "train", folder / "pictures")
    (folder / "pictures" / "metadata.jsonl").unlink()
    (folder / "pictures" / "2.txt").write_text(LONG)
    recipe = tree(
        data={"source": str(folder / "pictures")},
        train={"steps": 7, "log_every": 3, "sample_every": 0},
        evaluate={"scheduler": "euler_a"},
    )
    told = Told()
    return tunekit.train(recipe, out=folder / "run", reporter=told), told


def test_the_scheduler_draws_the_pictures(unusual: tuple[Run, Told], run: Run) -> None:
    other, _ = unusual
    kinds = {
        str(read_settings(path)["scheduler"])
        for path in (other.folder / "samples").glob("*_seed-1.png")
    }
    assert kinds == {"euler_a"}
    name = "samples/base_a-robot_red_seed-1.png"
    assert read_settings(run.folder / name)["scheduler"] == "DDIMScheduler"
    assert not np.array_equal(pixels(other.folder / name), pixels(run.folder / name))
    settings = DrawSettings(steps=2, guidance_scale=5.0, scheduler="euler_a")
    drawn = load(other.recipe.base).draw("a robot, red", 1, settings)
    assert np.array_equal(np.asarray(drawn), pixels(other.folder / name))


def test_a_caption_that_is_cut_is_told_with_what_is_never_read(unusual: tuple[Run, Told]) -> None:
    run, told = unusual
    [note] = [note for note in told.notes if "never reads the end of the caption" in note]
    found = re.search(r'2\.png \("(.+)"\)', note)
    assert found
    assert LONG.endswith(found[1])
    assert "0.png" not in note
    assert "never reads the end of the caption" in run.report.read_text()


def test_log_every_thins_the_lines_and_keeps_the_last(unusual: tuple[Run, Told]) -> None:
    run, told = unusual
    assert [line["step"] for line in metrics(run)] == [3, 6, 7]
    assert [point.step for point in board(run).Scalars("train/loss")] == [3, 6, 7]
    assert len(told.ticks["training"]) == 7


def test_tensorboard_holds_the_curves_the_samples_and_the_scores(run: Run) -> None:
    shown, lines = board(run), metrics(run)
    for name in ("loss", "lr", "grad_norm", "images_per_second", "memory_bytes"):
        points = shown.Scalars(f"train/{name}")
        assert [point.step for point in points] == [1, 2, 3, 4]
        assert [p.value for p in points] == pytest.approx([line[name] for line in lines], rel=1e-5)
    pictures = shown.Images("samples")
    assert [picture.step for picture in pictures] == [0, 2, 4]
    for picture in pictures:
        seen = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
        kept = pixels(run.folder / "samples" / f"step-{picture.step:06d}.png")
        assert np.array_equal(seen, kept)
    [likeness] = shown.Scalars("scores/likeness_score")
    score = run.scores["scores"]["likeness"]["score"]
    assert (likeness.step, likeness.value) == (4, pytest.approx(score, rel=1e-5))


def test_the_report_draws_the_loss_of_every_step(run: Run) -> None:
    page = run.report.read_text()
    curve = re.search(r'aria-label="Loss by step".*?<polyline [^>]*points="([^"]+)"', page)
    assert curve
    heights = [float(point.split(",")[1]) for point in curve[1].split()]
    losses = [line["loss"] for line in metrics(run)]
    assert len(heights) == len(losses) == 4
    # SVG counts downwards: the highest loss stands at the smallest y.
    assert np.argmin(heights) == np.argmax(losses)


def test_the_seed_orders_the_pictures(tree: Callable[..., Tree]) -> None:
    def order(seed: int) -> list[str]:
        """Return the pictures of three epochs, as they come."""
        recipe = recipe_from(tree(train={"seed": seed, "batch_size": 1}), [])
        batches = prepare(recipe, Silent()).dataset.batches(1, 1)
        return [batches(step, 0).names[0] for step in range(12)]

    first = order(0)
    assert order(0) == first
    assert order(1) != first
    assert sorted(order(1)) == sorted(first)


def test_pictures_of_the_class_are_trained_beside_and_shown(
    tree: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    prior = {"count": 2, "steps": 1, "prompts": ["a {class}", "a {class} at night"]}
    told = Told()
    with_class = tunekit.train(tree(data={"prior": prior}), out=tmp_path / "with", reporter=told)
    assert told.ticks["drawing the class"] == ["a robot", "a robot at night"]
    assert all(line["prior_loss"] > 0 for line in metrics(with_class))
    text = with_class.report.read_text()
    assert "2 of the 2 pictures that keep the class" in text
    assert "Pictures of the class, trained beside" in text
    # Twice the weight adds twice as much in the first step, and what is learned is another thing.
    heavier = tunekit.train(
        tree(data={"prior": {**prior, "weight": 2.0}}), out=tmp_path / "more", reporter=Silent()
    )
    first, other = metrics(with_class)[0], metrics(heavier)[0]
    assert other["prior_loss"] == pytest.approx(2 * first["prior_loss"])
    assert other["loss"] == first["loss"]
    assert metrics(heavier)[-1]["loss"] != metrics(with_class)[-1]["loss"]
