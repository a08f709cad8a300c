"""The mathematics of diffusion training: pure functions of tensors, nothing that holds state.

Notation: x is a clean latent, e the noise, t a timestep in 0..T-1. A noisy latent is
signal(t) x + sigma(t) e. Diffusion keeps the variance: signal = sqrt(a), sigma = sqrt(1 - a) with
a(t) = alphas_cumprod[t] (Ho et al. 2020, "Denoising Diffusion Probabilistic Models", eq. 4). A
rectified flow goes in a straight line: signal = 1 - sigma (Liu et al. 2022, "Flow Straight and
Fast"; Esser et al. 2024, "Scaling Rectified Flow Transformers", section 2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

PredictionType = Literal["epsilon", "v_prediction", "sample"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)
Loss = Literal["mse", "huber", "smooth_l1"]
HuberSchedule = Literal["constant", "exponential", "snr"]


class Schedule(ABC):
    """How much signal and how much noise there is at each timestep, and what is predicted."""

    prediction_type: str
    """"epsilon", "v_prediction", "sample" or "flow"."""

    @property
    @abstractmethod
    def signal(self) -> Tensor:
        """What the clean latent is multiplied with: [T] float32."""

    @property
    @abstractmethod
    def sigma(self) -> Tensor:
        """What the noise is multiplied with: [T] float32."""

    @property
    @abstractmethod
    def snr(self) -> Tensor:
        """The signal-to-noise ratio (signal / sigma)^2: [T] float32, 0..inf."""

    def __len__(self) -> int:
        return len(self.signal)


@dataclass(frozen=True, eq=False)
class NoiseSchedule(Schedule):
    """The schedule of a diffusion model, which keeps the variance.

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

    @property
    def signal(self) -> Tensor:
        return self.alphas_cumprod.sqrt()

    @property
    def sigma(self) -> Tensor:
        return (1 - self.alphas_cumprod).sqrt()

    @property
    def snr(self) -> Tensor:
        return self.alphas_cumprod / (1 - self.alphas_cumprod)


@dataclass(frozen=True, eq=False)
class FlowSchedule(Schedule):
    """The schedule of a rectified flow: a straight line from the picture to the noise.

    `sigmas`: [T] float32 in 0..1, rising. `cells`: the latent cells (h * w) at which the timesteps
    are right as they are; larger pictures need more noise (see timesteps.py). None: not known.
    `shifts`: latent cells -> the base's own shift, where it has a formula for it.
    """

    sigmas: Tensor
    cells: int | None = None
    shifts: Callable[[int], float] | None = None
    prediction_type = "flow"

    def __post_init__(self) -> None:
        s = self.sigmas
        assert s.ndim == 1, s.shape
        assert s.dtype == torch.float32, s.dtype
        assert bool(((s >= 0) & (s <= 1)).all()), "sigmas leave 0..1"

    @property
    def signal(self) -> Tensor:
        return 1 - self.sigmas

    @property
    def sigma(self) -> Tensor:
        return self.sigmas

    @property
    def snr(self) -> Tensor:
        return (self.signal / self.sigmas).square()


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Return the schedule shifted and stretched so that the last timestep is pure noise.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1:
    the first timestep stays as it is. Only for v_prediction and sample. A schedule that ends in
    pure noise already is returned as it is.
    """
    root = schedule.alphas_cumprod.double().sqrt()
    first, last = root[0], root[-1]
    if last == 0:
        return schedule
    root = (root - last) * (first / (first - last))
    return NoiseSchedule(root.square().clamp(0, 1).float(), schedule.prediction_type)


def _levels(schedule: Schedule, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return signal and sigma at `timesteps` [B], shaped [B, 1, ...] to multiply `like`."""

    def at(values: Tensor) -> Tensor:
        taken = values.to(like.device)[timesteps.to(like.device)]
        return taken.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)

    return at(schedule.signal), at(schedule.sigma)


def sample_timesteps(schedule: Schedule, batch: int, generator: torch.Generator) -> Tensor:
    """Draw timesteps uniformly over 0..T-1: [batch] int64 on the generator's device."""
    return torch.randint(len(schedule), (batch,), generator=generator, device=generator.device)


def sample_noise(
    shape: tuple[int, ...],
    generator: torch.Generator,
    noise_offset: float = 0.0,
    pyramid_discount: float = 0.0,
) -> Tensor:
    """Draw the noise of one latent.

    shape: (C, h, w). `noise_offset` times one more normal number is added to each whole channel,
    which teaches the denoiser to move the mean (Guttenberg 2023, "Diffusion with Offset Noise").
    `pyramid_discount`, 0 to 1: see `pyramid_noise`. Returns [C, h, w] float32 on the generator's
    device.
    """
    device = generator.device
    noise = torch.randn(shape, generator=generator, device=device)
    if noise_offset:
        lift = torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator, device=device)
        noise = noise + noise_offset * lift
    return pyramid_noise(noise, generator, pyramid_discount) if pyramid_discount else noise


def pyramid_noise(noise: Tensor, generator: torch.Generator, discount: float) -> Tensor:
    """Add coarser and coarser noise to `noise` [C, h, w], and scale the sum to a deviation of 1.

    Level i is 2 to 4 times coarser than the one before, enlarged smoothly and weighed discount^i;
    the last is one cell high or wide (Whitaker 2023, "Multi-Resolution Noise for Diffusion Model
    Training"). `discount`: 0 (none) to 1 (every level alike).
    """
    channels, height, width = noise.shape
    h, w, level = height, width, 0
    total = noise
    while min(h, w) > 1:
        level += 1
        by = 2 + 2 * torch.rand((), generator=generator, device=noise.device).item()
        h, w = max(1, int(h / by)), max(1, int(w / by))
        coarse = torch.randn(1, channels, h, w, generator=generator, device=noise.device)
        fine = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
        total = total + discount**level * fine[0]
    return total / total.std() if level else total


def perturb_noise(noise: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Return `noise` plus `strength` times fresh noise: what the input is made with.

    The target keeps the noise itself (Ning et al. 2023, "Input Perturbation Reduces Exposure Bias
    in Diffusion Models", algorithm 1, where 0.1 is advised).
    """
    return noise + strength * torch.randn(noise.shape, generator=generator, device=noise.device)


def add_noise(schedule: Schedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return signal x + sigma e. latents, noise: [B, ...]; timesteps: [B] int64."""
    signal, sigma = _levels(schedule, timesteps, latents)
    return signal * latents + sigma * noise


def target(schedule: Schedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the denoiser should predict: e, x, or a velocity.

    Of a diffusion it is sqrt(a) e - sqrt(1 - a) x (Salimans & Ho 2022, "Progressive Distillation",
    appendix D); of a flow e - x, the same at every timestep (Liu et al. 2022, eq. 1).
    latents, noise: [B, ...]; timesteps: [B] int64; returns [B, ...].
    """
    match schedule.prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return latents
        case "flow":
            return noise - latents
    signal, sigma = _levels(schedule, timesteps, latents)
    return signal * noise - sigma * latents


def snr(schedule: Schedule, timesteps: Tensor) -> Tensor:
    """Return the signal-to-noise ratio at `timesteps` [B]: [B] float32, 0..inf."""
    return schedule.snr.to(timesteps.device)[timesteps]


def loss_weights(
    schedule: Schedule,
    timesteps: Tensor,
    min_snr_gamma: float | None = None,
    *,
    soft_min_snr_gamma: float | None = None,
    p2_gamma: float | None = None,
    debiased: bool = False,
) -> Tensor:
    """Return the weight of each sample's error: [B] float32, >= 0; at most one way is chosen.

    Without one all ones. Each is told by W, the weight it gives the squared error of the implied
    clean latent; that makes W / SNR on epsilon, W / (SNR + 1) on v and W on the sample itself:

    - `min_snr_gamma`: min(SNR, gamma) (Hang et al. 2023, "Efficient Diffusion Training via Min-SNR
      Weighting Strategy", section 3.4);
    - `soft_min_snr_gamma`: SNR gamma / (SNR + gamma), the same without its corner (Crowson et al.
      2024, "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion
      Transformers", section 3.3);
    - `p2_gamma`: SNR / (1 + SNR)^gamma (Choi et al. 2022, "Perception Prioritized Training of
      Diffusion Models", eq. 8 with k = 1);
    - `debiased`: sqrt(SNR) (Yu et al. 2023, "Debias the Training of Diffusion Models", eq. 10).

    At SNR 0 the epsilon forms take their limits.
    """
    chosen = [min_snr_gamma, soft_min_snr_gamma, p2_gamma, debiased or None]
    assert sum(way is not None for way in chosen) <= 1, "one weighting at a time"
    ones = torch.ones(timesteps.shape, dtype=torch.float32, device=timesteps.device)
    if all(way is None for way in chosen):
        return ones
    assert isinstance(schedule, NoiseSchedule), "these weights are made for diffusion, not flow"
    ratio = snr(schedule, timesteps)
    # The forms on epsilon come first: they have no 0 / 0 at either end.
    if min_snr_gamma is not None:
        weights = (min_snr_gamma / ratio).clamp(max=1)
    elif soft_min_snr_gamma is not None:
        weights = soft_min_snr_gamma / (ratio + soft_min_snr_gamma)
    elif p2_gamma is not None:
        weights = (1 + ratio) ** -p2_gamma
    else:
        weights = ratio.rsqrt()
    if schedule.prediction_type == "epsilon":
        return weights
    velocity = schedule.prediction_type == "v_prediction"
    if min_snr_gamma is not None:
        capped = ratio.clamp(max=min_snr_gamma)
        return capped / (ratio + 1) if velocity else capped
    if debiased:
        return 1 / (ratio.sqrt() + ratio.rsqrt()) if velocity else ratio.sqrt()
    return weights / (1 + 1 / ratio) if velocity else weights * ratio


def huber_scale(
    schedule: Schedule, timesteps: Tensor, c: float, how: HuberSchedule = "constant"
) -> Tensor:
    """Return where the Huber loss turns from square to straight, at `timesteps`: [B] float32.

    `c`, above 0: the value of "constant"; the others fall towards it, from 1 in a clean picture to
    c in pure noise: "exponential" as c^(t / T), "snr" as (1 - c) / (1 + sigma / signal)^2 + c
    (Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance using Scheduled
    Pseudo-Huber Loss", section 4).
    """
    if how == "constant":
        return torch.full(timesteps.shape, c, dtype=torch.float32, device=timesteps.device)
    if how == "exponential":
        return c ** (timesteps.float() / len(schedule))
    return (1 - c) / (1 + snr(schedule, timesteps).rsqrt()) ** 2 + c


def pointwise_errors(
    prediction: Tensor, wanted: Tensor, loss: Loss = "mse", scale: Tensor | None = None
) -> Tensor:
    """Return the error of each number in float32: [B, ...] and [B, ...] -> [B, ...].

    "mse": the square d^2. With c = `scale` [B]: "huber" 2 c (sqrt(d^2 + c^2) - c), which is d^2
    where d is small, and "smooth_l1" 2 (sqrt(d^2 + c^2) - c), which is 2 |d| where d is large
    (Charbonnier's pseudo-Huber forms, as in Khrapov et al. 2024, section 3).
    """
    assert prediction.shape == wanted.shape, (prediction.shape, wanted.shape)
    square = (prediction.float() - wanted.float()).square()
    if loss == "mse":
        return square
    assert scale is not None, "the Huber losses need a scale"
    c = scale.to(square.device, torch.float32).reshape(-1, *[1] * (square.ndim - 1))
    # sqrt(d^2 + c^2) - c without the difference of two nearly equal numbers.
    bent = square / ((square + c.square()).sqrt() + c)
    return 2 * c * bent if loss == "huber" else 2 * bent


def sample_losses(
    prediction: Tensor,
    wanted: Tensor,
    mask: Tensor | None = None,
    *,
    loss: Loss = "mse",
    scale: Tensor | None = None,
) -> Tensor:
    """Return each sample's mean error in float32: [B, ...] and [B, ...] -> [B].

    mask: [B, 1, ...] weights >= 0 of the places, the same for all channels; the mean is then the
    weighted one, sum(w e) / sum(w), so that a small subject counts as much as a large one. No
    sample's weights may all be 0. `loss`, `scale`: see `pointwise_errors`.
    """
    errors = pointwise_errors(prediction, wanted, loss, scale)
    if mask is None:
        return errors.flatten(1).mean(dim=1)
    assert mask.shape == (len(errors), 1, *errors.shape[2:]), (mask.shape, errors.shape)
    weights = mask.float()
    # The mean over channels first: every channel has the same weights.
    total = (weights * errors.mean(dim=1, keepdim=True)).flatten(1).sum(dim=1)
    return total / weights.flatten(1).sum(dim=1)
