"""Tiny models of the real classes, saved in the real formats: random weights, nothing mocked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
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


def tiny_t5_tokenizer(max_length: int = 512) -> T5TokenizerFast:
    """Make T5's kind of tokenizer: of letters, and of robots as a whole."""
    letters = sorted({letter for sentence in SENTENCES for letter in sentence} - {" "})
    pieces = ["\u2581", *letters, *map(str, range(10)), "\u2581robot"]
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    scores = [(piece, -float(number)) for number, piece in enumerate(dict.fromkeys(pieces), 1)]
    return T5TokenizerFast(vocab=[*marks, *scores], extra_ids=0, model_max_length=max_length)


def _t5(tokenizer: T5TokenizerFast, width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def tiny_sd3(folder: Path, t5: bool = True, shift: float = 3.0, layers: int = 2) -> Path:
    """Save a Stable Diffusion 3 of 32-pixel pictures, with three text encoders or two.

    layers: of each CLIP.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizers = tiny_tokenizer(), tiny_tokenizer()
        tokenizers[1].pad_token = "!"
        third = tiny_t5_tokenizer() if t5 else None
        sizes = {"num_hidden_layers": layers, "hidden_size": 24, "projection_dim": 24}
        wide = {"num_hidden_layers": layers, "hidden_size": 32, "hidden_act": "gelu"}
        pipeline = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=8,
                num_layers=2,
                # A patch holds 64 numbers, which a narrower one could not tell apart.
                attention_head_dim=24,
                num_attention_heads=4,
                joint_attention_dim=64,
                caption_projection_dim=96,
                pooled_projection_dim=24 + 32,
                pos_embed_max_size=6,
                dual_attention_layers=(0,),
                qk_norm="rms_norm",
            ),
            text_encoder=CLIPTextModelWithProjection(_clip(tokenizers[0], **sizes)),
            text_encoder_2=CLIPTextModelWithProjection(_clip(tokenizers[1], **wide)),
            text_encoder_3=_t5(third, 64) if third is not None else None,
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            tokenizer_3=third,
            vae=_vae_of_flows(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_flux(folder: Path, guided: bool = True, **scheduler: Any) -> Path:
    """Save a FLUX.1 of 32-pixel pictures: dev, which is told its guidance, or schnell.

    dev's levels of noise shift with the size of a picture; here by 3 at every size.
    """
    moves = {"base_shift": math.log(3), "max_shift": math.log(3)}
    dynamic = {"use_dynamic_shifting": True, "shift": 3.0} | moves if guided else {"shift": 1.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizers = tiny_tokenizer(), tiny_t5_tokenizer()
        pipeline = FluxPipeline(
            transformer=FluxTransformer2DModel(
                num_layers=1,
                num_single_layers=2,
                # A patch holds 64 numbers, which a narrower one could not tell apart.
                attention_head_dim=24,
                num_attention_heads=4,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                guidance_embeds=guided,
                axes_dims_rope=(4, 10, 10),
            ),
            text_encoder=CLIPTextModel(_clip(tokenizers[0])),
            text_encoder_2=_t5(tokenizers[1], 32),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            vae=_vae_of_flows(scaling_factor=0.36, shift_factor=0.12),
            scheduler=FlowMatchEulerDiscreteScheduler(**dynamic | scheduler),
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


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


def _vae(**settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        sample_size=32,
        **{"latent_channels": 4} | settings,
    )


def _vae_of_flows(scaling_factor: float = 1.5, shift_factor: float = 0.06) -> AutoencoderKL:
    return _vae(
        latent_channels=16,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def diffusion_levels(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return sqrt(a) and sqrt(1 - a) by timestep, float64, from a scheduler's configuration.

    Betas as Rombach et al. 2022 have them; the zero terminal SNR of Lin et al. 2023, algorithm 1.
    """
    first, last = config["beta_start"] ** 0.5, config["beta_end"] ** 0.5
    betas = torch.linspace(first, last, 1000, dtype=torch.float64) ** 2
    signal = (1 - betas).cumprod(0).sqrt()
    if config.get("rescale_betas_zero_snr"):
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    return signal, (1 - signal**2).sqrt()


def flow_levels(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return 1 - sigma and sigma by timestep, float64: Esser et al. 2024, eq. 23."""
    shift = 1.0 if config["use_dynamic_shifting"] else config["shift"]
    places = torch.arange(1, 1001, dtype=torch.float64) / 1000
    sigma = shift * places / (1 + (shift - 1) * places)
    return 1 - sigma, sigma


def aim(
    prediction: str, signal: float, sigma: float, latents: Tensor, noise: Tensor
) -> tuple[Tensor, float]:
    """Return what is asked for, and its weight: min-SNR with gamma 5, none for a flow."""
    if prediction == "flow":
        return noise - latents, 1.0
    snr = (signal / sigma) ** 2
    if prediction == "epsilon":
        return noise, min(snr, 5.0) / snr
    return signal * noise - sigma * latents, min(snr, 5.0) / (snr + 1)


def unet_call(args: Any, kwargs: Any, output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy latents, timestep and prediction of a U-Net's call."""
    return args[0].clone(), args[1].clone(), output[0].clone()


def sd3_call(args: Any, kwargs: Any, output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy latents, timestep and prediction of a transformer's call.

    The pipeline tells it 1000 sigma; the timestep is the place of that sigma among the shifted
    ones, by eq. 23 the other way round.
    """
    sigma = kwargs["timestep"].double() / 1000
    timestep = 1000 * sigma / (3 - 2 * sigma) - 1
    return kwargs["hidden_states"].clone(), near(timestep), output[0].clone()


def flux_call(args: Any, kwargs: Any, output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same of a transformer that is given patches, and told sigma."""
    rows, columns = (2 * (int(n) + 1) for n in kwargs["img_ids"].amax(0)[1:])

    def cells(patches: Tensor) -> Tensor:
        """Put the four cells of each patch, [16, 2, 2], where they belong."""
        whole = torch.zeros(len(patches), 16, rows, columns)
        for number, place in enumerate(kwargs["img_ids"].long()):
            row, column = 2 * int(place[1]), 2 * int(place[2])
            patch = patches[:, number].reshape(-1, 16, 2, 2)
            whole[:, :, row : row + 2, column : column + 2] = patch
        return whole

    timestep = 1000 * kwargs["timestep"].double() - 1
    return cells(kwargs["hidden_states"]), near(timestep), cells(output[0])


def near(timestep: Tensor) -> Tensor:
    """Return a timestep that was reckoned in float32, without its rounding."""
    assert float((timestep - timestep.round()).abs().max()) < 1e-3, timestep
    return timestep.round().float()


def by_steps(steps: int) -> dict[str, Any]:
    """Return the pipeline's arguments for so many steps."""
    return {"num_inference_steps": steps}


def by_sigmas(steps: int) -> dict[str, Any]:
    """Return the same with levels that training knows as well: thousandths, shifted by 3 or not."""
    return {"num_inference_steps": steps, "sigmas": [1.0, 0.7, 0.5, 0.25][:steps]}


@dataclass(frozen=True)
class Tiny:
    """What the contract tests need of a family.

    build: saves a tiny base in a folder. variants: settings of `build` that between them reach each
    way of predicting. levels: scheduler's configuration -> what picture and noise are multiplied
    with, by timestep, computed by hand. weighting: keys of the objective that weigh timesteps, as
    `aim` does. denoiser: its place in the pipeline; recorded: (args, kwargs, output) of its call ->
    noisy latents [B, C, h, w], timestep, prediction. by_heart: keys of `train` by which one picture
    is learned. steps: how many -> the arguments of the pipeline's call for whole timesteps.
    schedulers: names that it draws with; None: all. words: whether plain diffusers reads files of
    new ones. negative: whether a negative prompt guides it.
    """

    build: Callable[..., Path]
    variants: Mapping[str, dict[str, Any]]
    levels: Callable[[Mapping[str, Any]], tuple[Tensor, Tensor]] = diffusion_levels
    weighting: Mapping[str, Any] = field(default_factory=lambda: {"min_snr_gamma": 5.0})
    denoiser: str = "unet"
    recorded: Callable[[Any, Any, Any], tuple[Tensor, Tensor, Tensor]] = unet_call
    by_heart: Mapping[str, Any] = field(
        default_factory=lambda: {
            "steps": 120,
            "batch_size": 1,
            "learning_rate": 5e-3,
            "objective": {"min_timestep": 400},
        }
    )
    steps: Callable[[int], dict[str, Any]] = by_steps
    schedulers: frozenset[str] | None = None
    words: bool = True
    negative: bool = True


_PREDICTIONS: Mapping[str, dict[str, Any]] = {
    "epsilon": {},
    "v": {"prediction_type": "v_prediction"},
    "zero snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}
_OF_FLOWS: Mapping[str, Any] = {
    "schedulers": frozenset({"euler", "lcm", "unipc", "FlowMatchEulerDiscreteScheduler"}),
    "by_heart": {
        "steps": 450,
        "batch_size": 1,
        "learning_rate": 5e-3,
        "schedule": "cosine",
        "objective": {"min_timestep": 400},
    },
}
# Every family: the contract tests run over all of them.
FAMILIES: dict[str, Tiny] = {
    "sd": Tiny(tiny_sd, _PREDICTIONS),
    "sdxl": Tiny(tiny_sdxl, _PREDICTIONS),
    "sd3": Tiny(
        tiny_sd3,
        {"three encoders": {}, "without T5": {"t5": False}},
        levels=flow_levels,
        weighting={},
        denoiser="transformer",
        recorded=sd3_call,
        steps=by_sigmas,
        words=False,
        **_OF_FLOWS,
    ),
    "flux": Tiny(
        tiny_flux,
        {"dev": {}, "schnell": {"guided": False}},
        levels=flow_levels,
        weighting={},
        denoiser="transformer",
        recorded=flux_call,
        steps=by_sigmas,
        negative=False,
        **_OF_FLOWS | {"by_heart": {**_OF_FLOWS["by_heart"], "steps": 160}},
    ),
}
BUILDERS: dict[str, Callable[..., Path]] = {name: tiny.build for name, tiny in FAMILIES.items()}
