"""Tiny models of the real classes, saved in the real formats: random weights, nothing mocked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

# What the tokenizer is trained on: the words that tests use are tokens or a few.
SENTENCES = (
    "a zorp robot",
    "a small red robot on the beach",
    "a blue cat in the snow, pixel art",
    "a photo of a green house at night, in watercolour style",
    "a picture of a yellow duck in a forest wearing a hat",
    "two shapes, a large purple circle and a square",
)


def tiny_tokenizer(max_length: int = 16, merges: int = 120) -> CLIPTokenizer:
    """Train CLIP's byte-pair tokenizer on SENTENCES."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=end))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    # Any letter can end a word. Named here because the trainer would number the endings it meets in
    # the order of a hash that differs from run to run, and break ties between merges by number.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [f"{letter}</w>" for letter in letters]
    bpe.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=len(letters) + len(endings) + merges,
            initial_alphabet=letters,
            end_of_word_suffix="</w>",
            special_tokens=endings,
            show_progress=False,
        ),
    )
    trained = json.loads(bpe.to_str())["model"]
    words = dict(trained["vocab"])
    # The marks come last: the end mark has the highest number, by which some CLIPs find it.
    for mark in (start, end):
        words[mark] = len(words)
    pairs = [tuple(pair) for pair in trained["merges"]]
    return CLIPTokenizer(vocab=words, merges=pairs, model_max_length=max_length)


def tiny_sd(folder: Path, prediction_type: str = "epsilon", **scheduler: Any) -> Path:
    """Save a Stable Diffusion of 32-pixel pictures and a quarter of a million weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = tiny_tokenizer()
        settings = _schedule(prediction_type, scheduler)
        pipeline = StableDiffusionPipeline(
            text_encoder=CLIPTextModel(_clip(tokenizer)),
            unet=_unet(
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=32,
                attention_head_dim=4,
            ),
            vae=_vae(),
            tokenizer=tokenizer,
            scheduler=DDIMScheduler(**{"clip_sample": False} | settings),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_sdxl(
    folder: Path, prediction_type: str = "epsilon", layers: int = 2, **scheduler: Any
) -> Path:
    """Save a Stable Diffusion XL of 32-pixel pictures: two text encoders, sizes and crops.

    layers: of each text encoder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizers = tiny_tokenizer(), tiny_tokenizer()
        tokenizers[1].pad_token = "!"  # as that of OpenCLIP
        deep = {"num_hidden_layers": layers}
        wide = {"hidden_size": 48, "projection_dim": 24, "hidden_act": "gelu"}
        pipeline = StableDiffusionXLPipeline(
            text_encoder=CLIPTextModel(_clip(tokenizers[0], **deep)),
            text_encoder_2=CLIPTextModelWithProjection(_clip(tokenizers[1], **wide, **deep)),
            unet=_unet(
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2),
                cross_attention_dim=32 + wide["hidden_size"],
                attention_head_dim=(2, 4),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=wide["projection_dim"] + 6 * 8,
            ),
            vae=_vae(),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            scheduler=EulerDiscreteScheduler(
                **{"timestep_spacing": "leading"} | _schedule(prediction_type, scheduler)
            ),
            add_watermarker=False,
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _schedule(prediction_type: str, scheduler: dict[str, Any]) -> dict[str, Any]:
    return {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "steps_offset": 1,
        "prediction_type": prediction_type,
    } | scheduler


def _clip(tokenizer: CLIPTokenizer, **settings: Any) -> CLIPTextConfig:
    usual = {"hidden_size": 32, "projection_dim": 32, "num_hidden_layers": 2}
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        intermediate_size=64,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **usual | settings,
    )


def _unet(**settings: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        **settings,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )


# A builder for each family: the contract tests run over all of them.
BUILDERS: dict[str, Callable[..., Path]] = {"sd": tiny_sd, "sdxl": tiny_sdxl}
