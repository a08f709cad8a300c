"""The mathematics of diffusion training: pure functions of tensors, nothing that holds state.

Notation: x is a clean latent, e the noise, t a timestep in 0..T-1, a(t) = alphas_cumprod[t];
a noisy latent is sqrt(a) x + sqrt(1 - a) e (Ho et al. 2020, "Denoising Diffusion Probabilistic
Models", eq. 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """How much of the signal is left at each timestep, and what the denoiser predicts.

    `alphas_cumprod`: [T] float32 in 0..1, falling; 0 at the end where the terminal SNR is zero.
    """

    alphas_cumprod: Tensor
    prediction_type: PredictionType

    def __post_init__(self) -> None:
        a = self.alphas_cumprod
        assert a.ndim == 1, a.shape
        assert a.dtype == torch.float32, a.dtype
        assert bool(((a >= 0) & (a <= 1)).all()), "alphas_cumprod leaves 0..1"
        assert self.prediction_type in PREDICTION_TYPES, self.prediction_type
        assert not (self.prediction_type == "epsilon" and bool((a == 0).any())), (
            "from pure noise the noise says nothing about the picture: epsilon with a terminal SNR "
            "of zero cannot be trained"
        )

    def __len__(self) -> int:
        return len(self.alphas_cumprod)


def _levels(schedule: NoiseSchedule, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(a) and sqrt(1 - a) at `timesteps` [B], shaped [B, 1, ...] to multiply `like`."""
    a = schedule.alphas_cumprod.to(like.device)[timesteps.to(like.device)]
    a = a.reshape(-1, *[1] * (like.ndim - 1))
    return a.sqrt().to(like.dtype), (1 - a).sqrt().to(like.dtype)


def sample_timesteps(schedule: NoiseSchedule, batch: int, generator: torch.Generator) -> Tensor:
    """Draw timesteps uniformly over 0..T-1: [batch] int64 on the generator's device."""
    return torch.randint(len(schedule), (batch,), generator=generator, device=generator.device)


def sample_noise(
    shape: tuple[int, ...], generator: torch.Generator, noise_offset: float = 0.0
) -> Tensor:
    """Draw the noise of one latent.

    shape: (C, h, w). `noise_offset` times one more normal number is added to each whole channel,
    which teaches the denoiser to move the mean (Guttenberg 2023, "Diffusion with Offset Noise").
    Returns [C, h, w] float32 on the generator's device.
    """
    device = generator.device
    noise = torch.randn(shape, generator=generator, device=device)
    if noise_offset:
        lift = torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator, device=device)
        noise = noise + noise_offset * lift
    return noise


def add_noise(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return sqrt(a) x + sqrt(1 - a) e. latents, noise: [B, ...]; timesteps: [B] int64."""
    signal, sigma = _levels(schedule, timesteps, latents)
    return signal * latents + sigma * noise


def target(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the denoiser should predict: e, x, or the velocity.

    The velocity is sqrt(a) e - sqrt(1 - a) x (Salimans & Ho 2022, "Progressive Distillation",
    appendix D). latents, noise: [B, ...]; timesteps: [B] int64; returns [B, ...].
    """
    if schedule.prediction_type == "epsilon":
        return noise
    if schedule.prediction_type == "sample":
        return latents
    signal, sigma = _levels(schedule, timesteps, latents)
    return signal * noise - sigma * latents


def snr(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """Return the signal-to-noise ratio a / (1 - a) at `timesteps` [B]: [B] float32, 0..inf."""
    a = schedule.alphas_cumprod.to(timesteps.device)[timesteps]
    return a / (1 - a)


def loss_weights(
    schedule: NoiseSchedule, timesteps: Tensor, min_snr_gamma: float | None = None
) -> Tensor:
    """Return the weight of each sample's mean squared error: [B] float32, finite, >= 0.

    Without `min_snr_gamma` all ones. With it the error of the implied clean latent weighs
    min(SNR, gamma), which is min(SNR, gamma) / SNR on epsilon, min(SNR, gamma) / (SNR + 1) on v
    and min(SNR, gamma) on the sample itself (Hang et al. 2023, "Efficient Diffusion Training via
    Min-SNR Weighting Strategy", section 3.4). At SNR 0 the epsilon form takes its limit, 1.
    """
    if min_snr_gamma is None:
        return torch.ones(timesteps.shape, dtype=torch.float32, device=timesteps.device)
    ratio = snr(schedule, timesteps)
    if schedule.prediction_type == "epsilon":
        # gamma / SNR, capped, is the same number and has no 0 / 0.
        return (min_snr_gamma / ratio).clamp(max=1)
    capped = ratio.clamp(max=min_snr_gamma)
    return capped / (ratio + 1) if schedule.prediction_type == "v_prediction" else capped


def sample_losses(prediction: Tensor, wanted: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return each sample's mean squared error in float32: [B, ...] and [B, ...] -> [B].

    mask: [B, 1, ...] weights >= 0 of the places, the same for all channels; the mean is then the
    weighted one, sum(w e^2) / sum(w), so that a small subject counts as much as a large one. No
    sample's weights may all be 0.
    """
    assert prediction.shape == wanted.shape, (prediction.shape, wanted.shape)
    squares = (prediction.float() - wanted.float()).square()
    if mask is None:
        return squares.flatten(1).mean(dim=1)
    assert mask.shape == (len(squares), 1, *squares.shape[2:]), (mask.shape, squares.shape)
    weights = mask.float()
    # The mean over channels first: every channel has the same weights.
    total = (weights * squares.mean(dim=1, keepdim=True)).flatten(1).sum(dim=1)
    return total / weights.flatten(1).sum(dim=1)
