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
from tunekit.toybox.pretrain.pictures import Pictures
from tunekit.toybox.pretrain.words import LENGTH, load_tokenizer

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, UNet2DConditionModel

CHANNELS = (32, 64, 96, 128)
CAPTION_DROPOUT = 0.1  # teaches the empty caption that guidance steers away from


def build(seed: int, channels: tuple[int, ...] = CHANNELS) -> UNet2DConditionModel:
    """A UNet2DConditionModel with Stable Diffusion 1.x's four levels of two layers."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=channels,
        layers_per_block=2, cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    """Cosine betas end in pure noise, so v-prediction learns brightness too (Lin et al. 2024)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", clip_sample=False,
        set_alpha_to_one=False, steps_offset=0, prediction_type="v_prediction",
        timestep_spacing="trailing",
    )  # fmt: skip


@dataclass(frozen=True)
class Encoded:
    """Latents [N, 4, 16, 16], features [M, 32, 128] of the different captions, and who has which."""

    latents: Any
    features: Any
    caption: Any

    def __len__(self) -> int:
        return len(self.latents)


@torch.no_grad()
def encode(work: Path, data: Pictures, name: str) -> Encoded:
    """Encode pictures and captions once; `features[0]` is the empty caption."""
    folder = work / f"encoded-{name}-{len(data)}"
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _encode_latents(work, data, folder)
        _encode_captions(work, [f["caption"] for f in data.facts], folder)
        (folder / "done").touch()
    return Encoded(*(np.load(folder / f"{n}.npy", mmap_mode="r")
                     for n in ("latents", "features", "caption")))  # fmt: skip


def _encode_latents(work: Path, data: Pictures, folder: Path) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(work / "vae").to(device()).eval()
    scale = vae.config.scaling_factor
    rows = []
    for start in range(0, len(data), 64):
        pixels = to_tensor(data.pixels[start : start + 64]).to(device())
        rows.append((vae.encode(pixels).latent_dist.mean * scale).cpu().numpy().astype(np.float16))
        if start % 6400 == 0:
            print(f"latents: {start}/{len(data)}", flush=True)
    np.save(folder / "latents.npy", np.concatenate(rows))


def _encode_captions(work: Path, captions: list[str], folder: Path) -> None:
    from transformers import CLIPTextModel

    tokenizer = load_tokenizer(work / "tokenizer")
    text = CLIPTextModel.from_pretrained(work / "clip").to(device()).eval()
    different = ["", *sorted(set(captions))]
    index = {c: i for i, c in enumerate(different)}
    rows = []
    for start in range(0, len(different), 256):
        ids = tokenizer(different[start : start + 256], padding="max_length", truncation=True,
                        max_length=LENGTH, return_tensors="pt").input_ids  # fmt: skip
        rows.append(text(ids.to(device()))[0].cpu().numpy().astype(np.float16))
    np.save(folder / "features.npy", np.concatenate(rows))
    np.save(folder / "caption.npy", np.array([index[c] for c in captions], np.int64))


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
    work: Path, data: Encoded, steps: int, batch: int = 64, lr: float = 2e-3, seed: int = 5,
    rank: int = 0, ranks: int = 1, channels: tuple[int, ...] = CHANNELS, decay: float = 0.9995,
) -> None:  # fmt: skip
    """Train the denoiser; `work/unet` holds the averaged weights when it is done."""
    unet = build(seed, channels).to(device()).train()
    stage = Stage(work / "unet-training", {"unet": unet}, _Shared([unet], lr, ranks), steps,
                  warmup=200, ema=decay, writes=rank == 0)  # fmt: skip
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
        words = np.where(drop.numpy(), 0, data.caption[rows])
        latents = torch.from_numpy(data.latents[rows].astype(np.float32))
        features = torch.from_numpy(data.features[words].astype(np.float32))
        a = alphas[t][:, None, None, None]
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        target = a.sqrt() * noise - (1 - a).sqrt() * latents
        to = device()
        predicted = unet(noisy.to(to), t.to(to), features.to(to)).sample
        return {"loss": F.mse_loss(predicted, target.to(to))}

    stage.run(step, batch)
    if rank == 0:
        save(work, stage.averaged("unet"), channels)


def save(work: Path, weights: dict[str, torch.Tensor], channels: tuple[int, ...]) -> None:
    """Write the denoiser as a diffusers component folder."""
    unet = build(0, channels)
    unet.load_state_dict(weights)
    unet.eval().save_pretrained(work / "unet")


def save_running(work: Path, channels: tuple[int, ...] = CHANNELS) -> dict[str, str]:
    """Write `work/unet` from the newest checkpoint of a run that still goes on."""
    from safetensors import safe_open

    with safe_open(work / "unet-training" / "state.safetensors", "pt") as file:
        head = "average.unet."
        weights = {k[len(head):]: file.get_tensor(k) for k in file.keys() if k.startswith(head)}
        meta: dict[str, str] = dict(file.metadata())
    save(work, weights, channels)
    (work / "unet" / "trained.json").write_text(json.dumps(meta))
    return meta
