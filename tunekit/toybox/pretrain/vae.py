"""Stage 2: the toybox's VAE: 64 px pictures to 16 x 16 latents of 4 channels and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tunekit.toybox.pretrain.clip import to_tensor
from tunekit.toybox.pretrain.common import Frugal, Stage, batches, device
from tunekit.toybox.pretrain.pictures import Pictures

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

KL = 4e-4  # weight of the divergence, a mean over latent elements
CROP = 32  # most steps see crops: the same pixels a second, four times the steps


def build(seed: int) -> AutoencoderKL:
    """An AutoencoderKL with 16-32-64 channels, a quarter of the picture's side in latents."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    blocks = (16, 32, 64)
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, norm_num_groups=8, sample_size=64,
    )  # fmt: skip


def picture_loss(drawn: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """L1 on pixels and on their differences to the right and below: edges count twice."""
    loss = (drawn - real).abs().mean()
    for axis in (2, 3):
        loss = loss + (drawn.diff(dim=axis) - real.diff(dim=axis)).abs().mean()
    return loss


def train(work: Path, data: Pictures, steps: int, batch: int = 16, seed: int = 2) -> Path:
    """Train on crops, the last quarter on whole pictures; gives the folder of the VAE."""
    vae = build(seed).to(device()).train()
    stage = Stage(work / "vae-training", {"vae": vae}, Frugal([vae], lr=2e-3), steps, ema=0.998)

    def step(number: int) -> dict[str, torch.Tensor]:
        whole = number >= 0.75 * steps
        count = batch // 2 if whole else batch
        rows = np.fromiter(batches(len(data), batch, number, seed), np.int64)[:count]
        pixels = to_tensor(data.pixels[rows])
        if not whole:
            x, y = np.random.default_rng([seed, number]).integers(0, 64 - CROP + 1, 2)
            pixels = pixels[:, :, y : y + CROP, x : x + CROP]
        pixels = pixels.to(device())
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(pixels)
        drawn = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        l1 = (drawn.detach() - pixels).abs().mean()
        return {"loss": picture_loss(drawn, pixels) + KL * kl, "l1": l1, "kl": kl.detach()}

    stage.run(step, batch)
    vae.load_state_dict(stage.averaged("vae"))
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(to_tensor(data.pixels[:512]).to(device())).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    vae.save_pretrained(work / "vae")
    return work / "vae"


def train_decoder(work: Path, data: Pictures, steps: int, batch: int = 12, seed: int = 7) -> Path:
    """Sharpen the decoder alone; latents, and so the denoiser, stay what they are."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(work / "vae").to(device()).train()
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    stage = Stage(work / "vae-decoder-training", {"vae": vae}, Frugal([vae], lr=1e-3), steps,
                  warmup=50, cooldown=0.8, ema=0.99)  # fmt: skip

    def step(number: int) -> dict[str, torch.Tensor]:
        rows = np.fromiter(batches(len(data), batch, number, seed), np.int64)
        pixels = to_tensor(data.pixels[rows]).to(device())
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mean
            # drawn latents are not as exact as encoded ones
            noise = torch.randn(latents.shape, generator=generator).to(latents)
        drawn = vae.decode(latents + 0.05 * noise).sample
        l1 = (drawn.detach() - pixels).abs().mean()
        return {"loss": picture_loss(drawn, pixels), "l1": l1}

    stage.run(step, batch)
    vae.load_state_dict(stage.averaged("vae"))
    vae.eval().save_pretrained(work / "vae")
    return work / "vae"
