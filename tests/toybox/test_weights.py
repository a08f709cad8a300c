"""The bundled weights: each part loads by its real class, and they fit together and the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tunekit import toybox
from tunekit.evaluation.embedders import Clip, SubjectEncoder
from tunekit.toybox import world
from tunekit.toybox.pretrain import attributes
from tunekit.toybox.pretrain.assess import held_out_scenes, load_judge, shares, verdicts

FILES = sorted(toybox.WEIGHTS.rglob("*.safetensors"))


def test_all_weights_are_half_precision_and_small() -> None:
    assert len(FILES) == 6
    assert sum(p.stat().st_size for p in toybox.WEIGHTS.rglob("*") if p.is_file()) < 40e6
    for path in FILES:
        with safe_open(path, "pt") as file:
            kinds = {file.get_tensor(name).dtype for name in list(file.keys())}
        assert {k for k in kinds if k.is_floating_point} == {torch.float16}, path.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(toybox.WEIGHTS)))
def test_every_number_is_finite(path: Path) -> None:
    for name, tensor in load_file(path).items():
        assert tensor.isfinite().all(), name


def test_each_part_loads_by_its_class_whole() -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, ResNetModel

    model = toybox.model_path()
    parts = [
        UNet2DConditionModel.from_pretrained(model / "unet", output_loading_info=True),
        AutoencoderKL.from_pretrained(model / "vae", output_loading_info=True),
        CLIPTextModel.from_pretrained(model / "text_encoder", output_loading_info=True),
        CLIPModel.from_pretrained(toybox.clip_path(), output_loading_info=True),
        ResNetModel.from_pretrained(toybox.subject_encoder_path(), output_loading_info=True),
    ]
    for part, found in parts:
        assert not found["missing_keys"], type(part).__name__
        assert not found["unexpected_keys"], type(part).__name__
    assert CLIPTokenizer.from_pretrained(model / "tokenizer").model_max_length == 32
    scheduler = DDIMScheduler.from_pretrained(model / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    load_judge(toybox.WEIGHTS)  # strict


def test_the_base_reads_with_the_clips_text_tower() -> None:
    """Bit by bit: the denoiser was taught on these features, and no other."""
    text = load_file(toybox.model_path() / "text_encoder" / "model.safetensors")
    clip = load_file(toybox.clip_path() / "model.safetensors")
    assert set(text) == {name for name in clip if name.startswith("text_model.")}
    for name, tensor in text.items():
        assert torch.equal(tensor, clip[name]), name


def fresh(count: int) -> tuple[list[world.Scene], torch.Tensor]:
    """Scenes of one figure, and their labels."""
    rng = np.random.default_rng(4343)
    scenes = [world.sample_scene(rng, world.FULL, pairs=0.0) for _ in range(count)]
    facts = [dict(zip(attributes.WORDS, s.attributes(), strict=True)) for s in scenes]
    return scenes, attributes.labels(facts)


def test_the_clip_names_what_fresh_pictures_show() -> None:
    clip = Clip.load("toybox")
    scenes, found = fresh(200)
    images = clip.embed_images([world.render(s) for s in scenes])
    texts = clip.embed_texts(attributes.captions(attributes.WORDINGS[0]))
    told = attributes.accuracy(images, texts, found)
    for way in ("joint", "centres"):
        assert min(told[way].values()) >= 85, told


def test_the_judge_names_what_the_renderer_draws() -> None:
    scenes = held_out_scenes(128, world.FULL)
    told = shares(verdicts(load_judge(toybox.WEIGHTS), [world.render(s) for s in scenes], scenes))
    assert min(told.values()) > 90, told


def test_the_subject_encoder_finds_the_same_individual_elsewhere() -> None:
    encoder = SubjectEncoder.load("toybox")
    rng = np.random.default_rng(31)
    individuals = [world.sample_individual(rng, world.FULL) for _ in range(24)]
    sides = []
    for place in ("beach", "forest"):
        figures = [world.sample_pose(rng, who, world.FULL, dressed=0.0) for who in individuals]
        scenes = [world.Scene((f,), place, "flat", i) for i, f in enumerate(figures)]
        sides.append(encoder.embed_images([world.render(s) for s in scenes]))
    hits = (sides[0] @ sides[1].T).argmax(1) == torch.arange(len(individuals))
    assert hits.float().mean() > 0.7


def test_the_autoencoder_gives_pictures_back() -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(toybox.model_path() / "vae", dtype=torch.float32).eval()
    pixels = torch.stack(
        [torch.from_numpy(np.asarray(world.render(s)).copy()) for s in fresh(32)[0]]
    )
    pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
        back = vae.decode(latents / vae.config.scaling_factor).sample
    assert latents.shape == (32, 4, 16, 16)
    assert 0.8 < latents.std() < 1.25
    assert (back - pixels).abs().mean() < 0.06
