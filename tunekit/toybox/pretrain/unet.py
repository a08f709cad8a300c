"""Stage 4: the toybox's denoiser, v-prediction on cached latents and frozen text features.

Latents and text features are computed once and mapped into memory. With several processes each
takes its part of every batch and gradients are averaged over gloo, so the sequence of updates does
not depend on how many there are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from tunekit.toybox.pretrain.clip import to_tensor
from tunekit.toybox.pretrain.common import Frugal, Stage, batches, device
from tunekit.toybox.pretrain.pictures import CHUNK, Pictures
from tunekit.toybox.pretrain.words import LENGTH, load_tokenizer

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, UNet2DConditionModel

CHANNELS = (32, 64, 128, 160)
HEADS = (1, 2, 4, 4)  # few heads: on a CPU attention over 256 tokens costs by the head
CAPTION_DROPOUT = 0.1  # teaches the empty caption that guidance steers away from


def build(seed: int, channels: tuple[int, ...] = CHANNELS) -> UNet2DConditionModel:
    """A UNet2DConditionModel with Stable Diffusion 1.x's four levels of two layers."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=channels,
        layers_per_block=2, cross_attention_dim=128, attention_head_dim=HEADS, norm_num_groups=16,
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    """Cosine betas end in pure noise, so v-prediction learns brightness too (Lin et al. 2024)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction",
        timestep_spacing="trailing",
    )  # fmt: skip


@dataclass(frozen=True)
class Encoded:
    """Latents [N, 4, 16, 16] and text features [N, 32, 128] in fp16, and the empty caption's."""

    latents: Any
    features: Any
    empty: Any

    def __len__(self) -> int:
        return len(self.latents)


def _holds(path: Path) -> int:
    """Pictures encoded in a file; 0 where there is none."""
    if not path.exists():
        return 0
    with np.load(path) as file:
        return len(file["latents"])


@torch.no_grad()
def encode(work: Path, data: Pictures, name: str) -> Encoded:
    """Encode pictures and captions once, a file a thousand, so that a set can grow."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    folder = work / f"encoded-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(work / "vae").to(device()).eval()
    tokenizer = load_tokenizer(work / "tokenizer")
    text = CLIPTextModel.from_pretrained(work / "clip").to(device()).eval()

    def features(captions: list[str]) -> np.ndarray:
        ids = tokenizer(captions, padding="max_length", truncation=True, max_length=LENGTH,
                        return_tensors="pt").input_ids  # fmt: skip
        told: np.ndarray = text(ids.to(device()))[0].cpu().numpy().astype(np.float16)
        return told

    def latents(pixels: np.ndarray) -> np.ndarray:
        mean = vae.encode(to_tensor(pixels).to(device())).latent_dist.mean
        scaled: np.ndarray = (mean * vae.config.scaling_factor).cpu().numpy().astype(np.float16)
        return scaled

    for start in range(0, len(data), CHUNK):
        path = folder / f"{start // CHUNK:04d}.npz"
        if _holds(path) >= min(CHUNK, len(data) - start):
            continue
        parts = [slice(i, i + 50) for i in range(start, min(start + CHUNK, len(data)), 50)]
        np.savez(
            path.with_suffix(".new.npz"),
            latents=np.concatenate([latents(data.pixels[p]) for p in parts]),
            features=np.concatenate(
                [features([f["caption"] for f in data.facts[p]]) for p in parts]
            ),
        )
        path.with_suffix(".new.npz").rename(path)
        print(f"encoded {name}: {min(start + CHUNK, len(data))}/{len(data)}", flush=True)
    files = [np.load(folder / f"{i:04d}.npz") for i in range((len(data) + CHUNK - 1) // CHUNK)]
    return Encoded(
        np.concatenate([f["latents"] for f in files])[: len(data)],
        np.concatenate([f["features"] for f in files])[: len(data)],
        features([""])[0],
    )


def _average_gradients(parameters: list[nn.Parameter], ranks: int) -> None:
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= ranks
    start = 0
    for g in grads:
        g.copy_(flat[start : start + g.numel()].view_as(g))
        start += g.numel()


class _Shared(Frugal):
    """The optimizer of several processes: averages gradients before it steps."""

    def __init__(self, modules: list[nn.Module], lr: float, ranks: int) -> None:
        super().__init__(modules, lr)
        self.ranks = ranks

    def step(self, share: float, max_norm: float = 1.0) -> float:
        if self.ranks > 1:
            _average_gradients([*self.matrices, *self.others], self.ranks)
        return super().step(share, max_norm)


def train(
    work: Path, data: Encoded, steps: int, batch: int = 96, lr: float = 2e-3, seed: int = 5,
    rank: int = 0, ranks: int = 1, channels: tuple[int, ...] = CHANNELS, decay: float = 0.9995,
    stage_name: str = "unet", begin: Path | None = None,
) -> None:  # fmt: skip
    """Train the denoiser, from nothing or from the folder `begin`.

    `work/unet` holds the averaged weights when it is done.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    unet = (
        build(seed, channels)
        if begin is None
        else UNet2DConditionModel.from_pretrained(begin, torch_dtype=torch.float32)
    )
    unet.to(device()).train()
    # with bf16, plain matrix products beat the fused attention of a CPU by half
    unet.set_attn_processor(AttnProcessor())
    stage = Stage(work / f"{stage_name}-training", {"unet": unet}, _Shared([unet], lr, ranks),
                  steps, warmup=200 if begin is None else 50, ema=decay,
                  writes=rank == 0)  # fmt: skip
    alphas = scheduler().alphas_cumprod

    def step(number: int) -> dict[str, torch.Tensor]:
        rows = np.fromiter(batches(len(data), batch, number, seed), np.int64)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        noise = torch.randn((batch, 4, 16, 16), generator=generator)
        drop = torch.rand(batch, generator=generator) < CAPTION_DROPOUT
        # one timestep in each of `batch` equal parts of the range: less noise in the gradient
        order = torch.randperm(batch, generator=generator)
        t = ((order + torch.rand(batch, generator=generator)) / batch * 1000).long()
        part = slice(rank * batch // ranks, (rank + 1) * batch // ranks)
        rows, noise, drop, t = rows[part], noise[part], drop[part], t[part]
        latents = torch.from_numpy(data.latents[rows].astype(np.float32))
        features = torch.from_numpy(data.features[rows].astype(np.float32))
        features[drop] = torch.from_numpy(data.empty.astype(np.float32))
        a = alphas[t][:, None, None, None]
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        target = a.sqrt() * noise - (1 - a).sqrt() * latents
        to = device()
        with torch.autocast(to.type, torch.bfloat16):
            predicted = unet(noisy.to(to), t.to(to), features.to(to)).sample
        return {"loss": F.mse_loss(predicted.float(), target.to(to))}

    stage.run(step, batch)
    if rank == 0:
        save(work, stage.averaged("unet"), channels)


def save(work: Path, weights: dict[str, torch.Tensor], channels: tuple[int, ...]) -> None:
    """Write the denoiser as a diffusers component folder."""
    unet = build(0, channels)
    unet.load_state_dict(weights)
    unet.eval().save_pretrained(work / "unet")


def save_running(work: Path, channels: tuple[int, ...] = CHANNELS) -> dict[str, str]:
    """Write `work/unet` from the newest checkpoint of the last stage begun, finished or not.

    Where none was begun, `work/unet` stays as it is and nothing is told.
    """
    from safetensors import safe_open

    states = [work / f"{name}-training" / "state.safetensors" for name in ("unet-marks", "unet")]
    newest = next((path for path in states if path.exists()), None)
    if newest is None:
        return {}
    with safe_open(newest, "pt") as file:
        head = "average.unet."
        names = [k for k in list(file.keys()) if k.startswith(head)]
        weights = {k.removeprefix(head): file.get_tensor(k) for k in names}
        meta: dict[str, str] = dict(file.metadata())
    save(work, weights, channels)
    (work / "unet" / "trained.json").write_text(json.dumps(meta))
    return meta
