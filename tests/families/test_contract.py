"""What a run promises on every family and with every adapter kind: it is right, not only running.

A family joins by its entry in `tiny.FAMILIES`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

import tunekit
from tunekit import adapters, families, inference, seeding, tokens
from tunekit.data import Cache, EncodedDataset, preflight
from tunekit.export import export_adapter, needed
from tunekit.families import Family
from tunekit.inference import DrawSettings, Painter
from tunekit.recipe import Recipe, recipe_from
from tunekit.schema import Base
from tunekit.train import Loop

Folder = Callable[..., Path]
FAMILIES = families.names()
VARIANTS = [
    pytest.param(name, variant, id=f"{name}-{label}")
    for name in FAMILIES
    for label, variant in tiny.FAMILIES[name].variants.items()
]
PROMPT = "a zorp robot"
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "alpha": 1.0, "targets": "full", "text_encoder": True},
    "loha": {"rank": 2},
    "lokr": {"rank": 2, "text_encoder": True},
    "oft": {"block_size": 4},
    "boft": {"block_size": 4},
    "full": {"targets": "attention"},
}
WORD = "<zorp>"
KINDS = [*adapters.names(), "tokens"]
PAIRS = [(n, k) for n in FAMILIES for k in KINDS]
READ = [(n, k) for n, k in PAIRS if k == "lora" or (k == "tokens" and tiny.FAMILIES[n].words)]


def told(folder: Path, pictures: Path, kind: str, **train: Any) -> Recipe:
    """Return a short recipe that teaches the base in `folder` by this kind."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "base": {"model": str(folder)},
        "data": {"source": str(pictures / "train"), "trigger": "zorp", "class": "robot"},
        "train": {"steps": 4, "batch_size": 2, "learning_rate": 0.01} | train,
        "evaluate": {"prompts": ["a {trigger} {class}"]},
        "export": {"dtype": "fp32"},
    }
    if kind == "tokens":
        tree["data"]["trigger"] = WORD
        tree["tokens"] = [{"name": WORD, "vectors": 2, "init": "robot", "learning_rate": 0.1}]
    else:
        tree["adapter"] = {"kind": kind, **SETTINGS[kind]}
    return recipe_from(tree)


class Teaching:
    """A base with what trains, and its pictures, as a run puts them together."""

    def __init__(self, recipe: Recipe, cache: Path) -> None:
        self.recipe = recipe
        self.family = families.load(recipe.base)
        own = recipe.data
        self.adapter = tokens.attach(
            self.family, recipe.adapter, recipe.tokens, own.class_noun, recipe.train.seed
        )
        text = self.adapter.trains_text_encoder
        self.encode = self.family.encode_prompt if text else None
        edge = self.family.default_resolution
        self.dataset = EncodedDataset.encode(
            preflight(own.model_copy(update={"resolution": edge}), multiple=8).examples,
            own,
            resolution=edge,
            multiple=self.family.size_multiple,
            seed=recipe.train.seed,
            encode_image=self.family.encode_image,
            image_fingerprint=self.family.name,
            encode_prompt=None if text else self.family.encode_prompt,
            text_fingerprint=self.family.name,
            cache=Cache(cache),
        )
        self.loop = Loop(self.family, self.adapter, recipe.train, encode=self.encode)

    def teach(self, start: int = 0, end: int | None = None) -> list[Any]:
        batches = self.dataset.batches(self.recipe.train.batch_size)
        records = []
        for record in self.loop.run(batches, start):
            records.append(record)
            if record.step == end:
                break
        return records

    def draw(self) -> np.ndarray[Any, Any]:
        return picture(Painter.of(self.family, self.adapter))


def picture(painter: Painter) -> np.ndarray[Any, Any]:
    settings = DrawSettings(steps=2, guidance_scale=3.0)
    return np.asarray(painter.draw(prompt_of(painter), 7, settings), dtype=np.int64)


def prompt_of(painter: Painter) -> str:
    known = [tokenizer.get_vocab() for tokenizer in painter.family.tokenizers.values()]
    return f"a {WORD} robot" if known and WORD in known[0] else PROMPT


def by_diffusers(folder: Path, files: list[Path], prompt: str) -> np.ndarray[Any, Any]:
    """Return the picture that plain diffusers draws with these files, by its own loaders."""
    pipeline = plain(folder)
    keys = families.recognise(folder).embedding_keys
    for path in files:
        tensors = load_file(path)
        if WORD not in prompt:
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
        elif not keys:
            pipeline.load_textual_inversion(str(path))
        for encoder, key in keys.items() if WORD in prompt else ():
            pipeline.load_textual_inversion(
                tensors[key],
                token=WORD,
                text_encoder=getattr(pipeline, encoder),
                tokenizer=getattr(pipeline, encoder.replace("text_encoder", "tokenizer")),
            )
    drawn = pipeline(
        prompt,
        num_inference_steps=2,
        guidance_scale=3.0,
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    return np.asarray(drawn, dtype=np.int64)


def plain(folder: Path) -> Any:
    index = json.loads((folder / "model_index.json").read_text())
    # diffusers wants to be told what a base lacks.
    lacks = {name: None for name in index if name.startswith("t") and index[name] == [None, None]}
    pipeline = DiffusionPipeline.from_pretrained(folder, **lacks)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def same(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    """Say whether two pictures are the same but for the rounding of sums."""
    assert one.shape == other.shape
    return bool(np.abs(one - other).max() <= 1)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_it_trains_resumes_exports_and_draws(
    name: str, kind: str, tiny_folder: Folder, pictures: Path, tmp_path: Path
) -> None:
    folder = tiny_folder(name)
    if kind == "tokens":
        pictures = uncaptioned(pictures, tmp_path)
    recipe = told(folder, pictures, kind)
    whole = Teaching(recipe, tmp_path / "cache")
    whole.teach(end=2)
    state = {part: dict(tensors) for part, tensors in whole.loop.state().items()}
    state = {part: {k: v.clone() for k, v in held.items()} for part, held in state.items()}
    records = whole.teach(start=2)

    resumed = Teaching(recipe, tmp_path / "cache")
    resumed.loop.load_state(state)
    again = resumed.teach(start=2)
    assert [r.loss for r in again] == [r.loss for r in records]
    ours, others = whole.adapter.state(), resumed.adapter.state()
    assert all(torch.equal(ours[key], others[key]) for key in ours)

    drawn = whole.draw()
    # Verified: every tensor taken up, weights changed and predictions made as in training.
    files = export_adapter(whole.family, whole.adapter, recipe, tmp_path / "export")
    assert all(file.parity.error < 1e-3 for file in files)
    fresh = inference.load(recipe.base, needed(files))
    assert same(picture(fresh), drawn)
    assert not same(picture(Painter(families.load(recipe.base))), drawn)
    # What was drawn in training is what plain diffusers draws, where it reads the kind.
    for file in files if kind != "tokens" else files[:1]:
        if file.diffusers:
            theirs = by_diffusers(folder, [file.path], recipe_prompt(kind))
            assert same(theirs, drawn), file.layout
    if (name, kind) in READ:
        assert any(file.diffusers for file in files)


@pytest.mark.parametrize(("name", "kind"), READ)
def test_the_code_in_the_model_card_draws_it(
    name: str, kind: str, tiny_folder: Folder, pictures: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = tiny_folder(name)
    if kind == "tokens":
        pictures = uncaptioned(pictures, tmp_path)
    recipe = told(folder, pictures, kind, steps=2)
    evaluate = recipe.evaluate.model_copy(update={"steps": 2, "guidance_scale": 3.0})
    recipe = recipe.model_copy(update={"evaluate": evaluate})
    teaching = Teaching(recipe, tmp_path / "cache")
    teaching.teach()
    files = export_adapter(teaching.family, teaching.adapter, recipe, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path / "export")
    held: dict[str, Any] = {}
    exec(code.replace(f"path/to/{folder.name}", str(folder)), held)
    painter = inference.load(recipe.base, needed(files))
    settings = DrawSettings(steps=2, guidance_scale=3.0)
    drawn = painter.draw(recipe_prompt(kind), 1, settings)
    assert same(np.asarray(held["picture"], dtype=np.int64), np.asarray(drawn, dtype=np.int64))


def recipe_prompt(kind: str) -> str:
    return f"a {WORD} robot" if kind == "tokens" else PROMPT


def uncaptioned(pictures: Path, folder: Path) -> Path:
    """Copy pictures without captions of their own, so that they are called by the word."""
    (folder / "train").mkdir()
    for path in (pictures / "train").glob("*.png"):
        shutil.copy(path, folder / "train")
    return folder


@pytest.mark.parametrize(
    ("name", "deep"), [("sd", {}), ("sdxl", {"layers": 3}), ("sd3", {"layers": 3})]
)
def test_clip_skip_goes_from_the_recipe_into_every_picture(
    name: str, deep: dict[str, int], tiny_folder: Folder, pictures: Path, tmp_path: Path
) -> None:
    folder = tiny_folder(name, **deep)
    recipe = told(folder, pictures, "lora", steps=2)
    base = recipe.base.model_copy(update={"clip_skip": 1})
    recipe = recipe.model_copy(update={"base": base})
    teaching = Teaching(recipe, tmp_path / "cache")
    teaching.teach()
    drawn = teaching.draw()
    files = export_adapter(teaching.family, teaching.adapter, recipe, tmp_path / "export")
    again = tunekit.load(str(folder), files[0].path)  # the file says it, whoever names the base
    assert again.family.clip_skip == 1  # type: ignore[attr-defined]
    assert same(picture(again), drawn)
    assert not same(picture(inference.load(str(folder), files[0].path)), drawn)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_noise_target_and_weight_are_those_of_the_papers(
    name: str, variant: dict[str, Any], tiny_folder: Folder, pictures: Path, tmp_path: Path
) -> None:
    """What the loop gives the denoiser, and the loss it reckons, against float64 by hand."""
    folder = tiny_folder(name, **variant)
    how = tiny.FAMILIES[name]
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    recipe = told(folder, pictures, "lora", steps=1, objective=dict(how.weighting))
    teaching = Teaching(recipe, tmp_path)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    predict = teaching.family.predict

    def recorded(noisy: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        prediction = predict(noisy, timesteps, conditioning)
        seen.append((noisy.clone(), timesteps.clone(), prediction.detach().clone()))
        return prediction

    teaching.family.predict = recorded  # type: ignore[method-assign]
    batch = teaching.dataset.batch(0, 0, 2)
    latents = batch.latents.double()
    draws = [seeding.generator(recipe.train.seed, f"noise/{i}", 0) for i in range(2)]
    noise = torch.stack([torch.randn(latents.shape[1:], generator=one).double() for one in draws])
    for timestep in (0, 1, 500, 998, 999):
        ends = {"min_timestep": timestep, "max_timestep": timestep}
        objective = recipe.train.objective.model_copy(update=ends)
        settings = recipe.train.model_copy(update={"objective": objective})
        loop = Loop(teaching.family, teaching.adapter, settings, encode=teaching.encode)
        (record,) = loop.run(lambda step, micro: batch)
        noisy, timesteps, prediction = seen.pop()
        assert timesteps.tolist() == [timestep, timestep]
        signal, sigma = (float(levels[timestep]) for levels in how.levels(config))
        wanted = signal * latents + sigma * noise
        torch.testing.assert_close(noisy.double(), wanted, atol=1e-5, rtol=1e-5)
        kind = config.get("prediction_type", "flow")
        target, weight = tiny.aim(kind, signal, sigma, latents, noise)
        loss = weight * (prediction.double() - target).square().mean()
        assert record.loss == pytest.approx(float(loss), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_the_prediction_is_that_of_diffusers_own_pipeline(
    name: str, variant: dict[str, Any], tiny_folder: Folder
) -> None:
    """Size conditioning, guidance and all: on a picture that is not square."""
    folder = tiny_folder(name, **variant)
    how, family = tiny.FAMILIES[name], families.load(Base(model=str(folder)))
    pipeline, edge = plain(folder), family.default_resolution
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    denoiser = getattr(pipeline, how.denoiser)
    denoiser.register_forward_hook(
        lambda _, args, kwargs, output: seen.append(how.recorded(args, kwargs, output)),
        with_kwargs=True,
    )
    pipeline(
        PROMPT,
        **how.steps(4),
        guidance_scale=1.0,
        height=edge,
        width=edge + 16,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    assert len(seen) == 4
    conditioning = family.encode_prompt([PROMPT])
    with torch.no_grad():
        for noisy, timestep, prediction in seen:
            assert float(timestep) == round(float(timestep)), "the loop trains whole timesteps"
            ours = family.predict(noisy, timestep.long().reshape(1), conditioning)
            torch.testing.assert_close(ours, prediction, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_picture_is_learned_by_heart(
    name: str, tiny_folder: Folder, pictures: Path, tmp_path: Path
) -> None:
    """At fixed noise and timesteps nearly all of the error goes."""
    recipe = told(tiny_folder(name), pictures, "full", **tiny.FAMILIES[name].by_heart)
    settings = recipe.adapter.model_copy(update={"targets": "all"})  # type: ignore[union-attr]
    teaching = Teaching(recipe.model_copy(update={"adapter": settings}), tmp_path)
    batch = teaching.dataset.batch(0, 0, 1)
    before = error(teaching.family, batch)
    assert len(list(teaching.loop.run(lambda step, micro: batch))) == recipe.train.steps
    after = error(teaching.family, batch)
    assert after <= 0.1 * before, (before, after)


@torch.no_grad()
def error(family: Family, batch: Any) -> float:
    """Return the mean square error over some timesteps, always with the same noise."""
    from tunekit import diffusion

    timesteps = torch.tensor([450, 600, 750, 900, 999])
    latents = batch.latents.expand(len(timesteps), -1, -1, -1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    noisy = diffusion.add_noise(family.schedule, latents, noise, timesteps)
    words = {k: v.expand(len(timesteps), *v.shape[1:]) for k, v in batch.conditioning.items()}
    words = family.with_sizes(words, batch.sizes.expand(len(timesteps), -1))
    wanted = diffusion.target(family.schedule, latents, noise, timesteps)
    return float((family.predict(noisy, timesteps, words) - wanted).square().mean())
