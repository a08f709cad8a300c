"""How good the toybox is, told by a judge that never saw it train: the table and the sheet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from tunekit.toybox import world
from tunekit.toybox.pretrain.clip import to_tensor
from tunekit.toybox.pretrain.judge import HEADS, Judge

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

BAR = {"subject": 90.0, "colour": 90.0, "place": 90.0, "style": 85.0}


def held_out_scenes(count: int, words: world.Vocabulary, seed: int = 77) -> list[world.Scene]:
    """Scenes of one medium or big figure in combinations that pretraining never saw together."""
    rng = np.random.default_rng(seed)
    found: list[world.Scene] = []
    while len(found) < count:
        scene = world.sample_scene(rng, words, pairs=0.0)
        if world.held_out(scene.attributes()):
            found.append(scene)
    return found


def load_judge(weights: Path) -> Judge:
    """Read the trained judge from a folder that holds `judge/model.safetensors`."""
    from safetensors.torch import load_file

    judge = Judge()
    judge.load_state_dict(load_file(weights / "judge" / "model.safetensors"))
    return judge.float().eval()


@torch.no_grad()
def verdicts(judge: Judge, images: Sequence[Image.Image], scenes: Sequence[world.Scene]
             ) -> dict[str, list[bool]]:  # fmt: skip
    """By attribute, picture by picture: does the judge name what the caption asked for?"""
    pixels = to_tensor(np.stack([np.asarray(i.convert("RGB")) for i in images]))
    out = judge(pixels)
    asked = [dict(zip(HEADS, s.attributes(), strict=True)) for s in scenes]
    return {
        k: [words[int(i)] == a[k] for i, a in zip(out[k].argmax(1), asked, strict=True)]
        for k, words in HEADS.items()
    }


def shares(told: dict[str, list[bool]]) -> dict[str, float]:
    """Percent right by attribute."""
    return {k: round(100 * float(np.mean(v)), 1) for k, v in told.items()}


@torch.no_grad()
def reconstruct(pipeline: StableDiffusionPipeline, images: Sequence[Image.Image]
                ) -> list[Image.Image]:  # fmt: skip
    """Pictures through the VAE and back."""
    drawn: list[Image.Image] = []
    for start in range(0, len(images), 32):
        pixels = to_tensor(np.stack([np.asarray(i) for i in images[start : start + 32]]))
        back = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
        array = ((back.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        drawn += [Image.fromarray(a) for a in array]
    return drawn


def draw(pipeline: StableDiffusionPipeline, captions: Sequence[str], guidance: float,
         steps: int = 25, seed: int = 0) -> list[Image.Image]:  # fmt: skip
    """Draw each caption from its own seed, 16 at a time."""
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(captions), 16):
        part = list(captions[start : start + 16])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        images += pipeline(part, num_inference_steps=steps, guidance_scale=guidance,
                           generator=generators).images  # fmt: skip
    return images


def sheet(images: Sequence[Image.Image], columns: int, zoom: int = 2) -> Image.Image:
    """A contact sheet."""
    side = images[0].width * zoom + 4
    rows = (len(images) + columns - 1) // columns
    page = Image.new("RGB", (columns * side, rows * side), "white")
    for i, image in enumerate(images):
        big = image.resize((image.width * zoom,) * 2, Image.Resampling.NEAREST)
        page.paste(big, (i % columns * side, i // columns * side))
    return page


def assess(weights: Path, work: Path, count: int = 256, guidance: float = 4.0,
           words: world.Vocabulary = world.CORE) -> dict[str, Any]:  # fmt: skip
    """Draw captions of unseen combinations, judge them, and save the sheet; gives the table.

    `weights` holds the folders model and judge; `work` takes sheet.png and assessment.json.
    """
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(weights / "model", dtype=torch.float32)
    judge = load_judge(weights)
    scenes = held_out_scenes(count, words)
    rng = np.random.default_rng(78)
    captions = [world.caption(s, rng, complete=True) for s in scenes]
    real = [world.render(s) for s in scenes]
    drawn = draw(pipeline, captions, guidance)
    told = {
        "rendered": shares(verdicts(judge, real, scenes)),
        "reconstructed": shares(verdicts(judge, reconstruct(pipeline, real), scenes)),
        "drawn": shares(verdicts(judge, drawn, scenes)),
    }
    sheet(drawn[: min(count, 96)], 16).save(work / "sheet.png")
    table = {"pictures": count, "steps": 25, "guidance_scale": guidance, "bar": BAR, **told,
             "captions": captions[:96]}  # fmt: skip
    (work / "assessment.json").write_text(json.dumps(table, indent=1))
    return table
