"""Runs that go on, held to runs that were never stopped: small recipes, and what a run sees."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from looped import assert_equal, untimed
from PIL import Image
from torch import Tensor

from tunekit import checkpoint
from tunekit.data.dataset import Batch
from tunekit.preparation import Prepared, prepare, quietly
from tunekit.progress import Silent
from tunekit.recipe import Recipe, load_recipe, recipe_from
from tunekit.train import Loop, StepRecord

Tree = dict[str, dict[str, Any]]
STEPS, STOP = 6, 3
LORA = {"kind": "lora", "rank": 2}
WORD = {"name": "<zorp>", "vectors": 2, "init": "red"}
HAT = {"name": "<hat>", "keep_norm": True}
TOLD = {
    "trigger": "<zorp>",
    "captions": {"template": "a <zorp> {class}, <hat>", "trigger": "insert"},
}
TEXT = {**LORA, "text_encoder": True, "dropout": 0.2}
NOISY = {"input_perturbation": 0.1, "pyramid_noise": 0.5, "timestep_sampling": "mode"}
EVERYTHING: Tree = {
    "data": {
        "trigger": "<zorp>",
        "captions": {"trigger": "insert", "dropout": 0.3, "shuffle": True},
        "crop": "random",
        "flip": True,
        "mask": {"background_weight": 0.2},
        "prior": {"count": 3, "steps": 1},
    },
    "tokens": [{**WORD, "stop_at": 0.7}],
    "adapter": TEXT,
    "train": {
        "ema": 0.9,
        "batch_size": 1,
        "gradient_accumulation": 3,
        "gradient_checkpointing": True,
        "schedule": "cosine",
        "objective": NOISY,
    },
}


def draw_pictures(folder: Path) -> Path:
    """Fill a folder with pictures of two shapes, each with a mask; some have captions."""
    rng = np.random.default_rng(0)
    for number in range(4):
        wide = 10 if number % 2 else 14
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(10, 0).repeat(wide, 1)
        Image.fromarray(blocks).save(folder / f"{number}.png")
        Image.fromarray(blocks[..., 0]).save(folder / f"{number}.mask.png")
        if number % 2:
            (folder / f"{number}.txt").write_text(f"robot {number}, red, snow")
    return folder


def recipe_of(
    tree: Callable[..., Tree], pictures: Path, way: Tree, model: Path | None = None
) -> Recipe:
    """Return the recipe of a small run that does what a way says. model: another base."""
    usual: Tree = {
        "data": {"source": str(pictures), "holdout": None, "captions": {"dropout": 0.2}},
        "train": {"steps": STEPS, "batch_size": 2, "sample_every": 0, "seed": 5},
        "adapter": LORA,
    }
    sections = {
        name: {**usual.get(name, {}), **way.get(name, {})}
        for name in {*usual, *way} - {"adapter", "tokens"}
    }
    made = tree(**sections)
    made["adapter"] = way.get("adapter", LORA)
    if "tokens" in way:
        made["tokens"] = way["tokens"]
    if made["adapter"] is None:
        del made["adapter"]
    if model is not None:
        made["base"]["model"] = str(model)
    return recipe_from(made)


class Live:
    """A run in memory, prepared afresh; `seen` holds all that came to the denoiser."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        with quietly():
            self.ready: Prepared = prepare(recipe, Silent())
        text = self.ready.adapter.trains_text_encoder
        encode = self.ready.family.encode_prompt if text else None
        self.loop = Loop(self.ready.family, self.ready.adapter, recipe.train, encode=encode)
        self.batches = self.ready.batches(recipe.train)
        self.seen: dict[int, list[Any]] = {}
        self.step = -1
        self.fault: Callable[[str, int, int], None] = lambda place, step, micro: None
        self.ready.family.denoiser.register_forward_pre_hook(self._called, with_kwargs=True)

    def _called(self, module: Any, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            self.seen[self.step].append(("denoiser", digest([args, kwargs])))
            self.fault("denoiser", self.step, self.micro)

    def asked(self, step: int, micro: int) -> list[Batch]:
        """Hand out batches, and remember which."""
        if micro == 0:
            self.seen[step] = []
        self.step, self.micro = step, micro
        self.fault("pictures", step, micro)
        given = self.batches(step, micro)
        assert isinstance(given, list)
        for batch in given:
            told = (batch.names, batch.captions, batch.prior)
            tensors = [batch.latents, batch.mask, batch.weights, batch.sizes]
            self.seen[step].append((told, digest([*tensors, batch.conditioning])))
        return given

    def go(self, start: int, end: int, *, saving: bool = False) -> list[StepRecord]:
        """Take the steps from `start` to `end`, and save where that is asked for."""
        records = []
        for record in self.loop.run(self.asked, start):
            records.append(record)
            if record.step == STOP and saving:
                self.save(STOP)
            if record.step == end:
                break
        return untimed(records)

    def save(self, step: int) -> None:
        state = self.loop.state()
        checkpoint.save(self.folder / f"step-{step:06d}", state, {"step": step})

    def take_up(self, step: int) -> None:
        """Be where another one was when it saved, and know it to the bit."""
        saved = checkpoint.read(self.folder / f"step-{step:06d}").tensors
        self.loop.load_state(saved)
        assert_same(saved, self.loop.state())


def digest(values: Any) -> str:
    """Return a fingerprint of tensors and plain values, to the bit."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(
                value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
        elif isinstance(value, Mapping):
            for key in sorted(value):
                found.update(key.encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for one in value:
                add(one)
        else:
            assert value is None or isinstance(value, bool | int | float | str), type(value)
            found.update(repr(value).encode())

    add(values)
    return found.hexdigest()


def assert_same(one: Mapping[str, dict[str, Tensor]], other: Mapping[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert all(one[name][key].dtype == other[name][key].dtype for key in one[name]), name
        assert_equal(one[name], other[name])


def assert_ended_alike(
    whole: Live, records: list[StepRecord], last: Live, later: list[StepRecord]
) -> None:
    """Hold a run that went on, and the steps it took, to the one that was never stopped."""
    first = later[0].step - 1
    assert later == records[first:]
    seen = {step: told for step, told in last.seen.items() if step >= first}
    assert seen == {step: told for step, told in whole.seen.items() if step >= first}
    assert_same(whole.loop.state(), last.loop.state())


def main(folders: list[str]) -> None:
    """Go on in each folder, which holds a recipe, and print how what is known ended."""
    for folder in map(Path, folders):
        live = Live(load_recipe(folder / "recipe.yaml"), folder)
        live.take_up(STOP)
        live.go(STOP, STEPS)
        told = digest([live.seen[STEPS - 1], live.loop.state()])
        sys.stdout.write(f"ended {told}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
