"""The mathematics against independent computations: numpy in float64, and diffusers' schedulers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from tunekit import diffusion
from tunekit.diffusion import NoiseSchedule

ENDS = [0, 1, 250, 500, 998, 999]


def scheduler(prediction_type: str = "epsilon", zero: bool = False) -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero,
    )


def schedule(prediction_type: str = "epsilon", zero: bool = False) -> NoiseSchedule:
    return NoiseSchedule(scheduler(prediction_type, zero).alphas_cumprod, prediction_type)


def signal_share() -> np.ndarray:
    """Stable Diffusion's a(t), from the paper's definition and in float64."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    return np.cumprod(1 - betas)


def pair(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    both = torch.randn(2, count, 4, 3, 5, generator=generator)
    return both[0], both[1]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_noising_and_target_equal_the_definition(prediction_type: str) -> None:
    x, e = pair(len(ENDS))
    t = torch.tensor(ENDS)
    a = signal_share()[ENDS][:, None, None, None]
    x64, e64 = x.double().numpy(), e.double().numpy()
    wanted = {
        "epsilon": e64,
        "sample": x64,
        "v_prediction": np.sqrt(a) * e64 - np.sqrt(1 - a) * x64,
    }[prediction_type]
    ours = schedule(prediction_type)
    np.testing.assert_allclose(
        diffusion.add_noise(ours, x, e, t), np.sqrt(a) * x64 + np.sqrt(1 - a) * e64, atol=2e-6
    )
    np.testing.assert_allclose(diffusion.target(ours, x, e, t), wanted, atol=2e-6)


@pytest.mark.parametrize("zero", [False, True])
def test_noising_and_velocity_equal_those_of_diffusers(zero: bool) -> None:
    x, e = pair(len(ENDS))
    t = torch.tensor(ENDS)
    ours, theirs = schedule("v_prediction", zero), scheduler("v_prediction", zero)
    assert torch.equal(diffusion.add_noise(ours, x, e, t), theirs.add_noise(x, e, t))
    assert torch.equal(diffusion.target(ours, x, e, t), theirs.get_velocity(x, e, t))


def test_zero_terminal_snr_ends_in_pure_noise_and_asks_for_the_negative_picture() -> None:
    x, e = pair(1)
    ours, last = schedule("v_prediction", zero=True), torch.tensor([999])
    assert torch.equal(diffusion.add_noise(ours, x, e, last), e)
    assert torch.equal(diffusion.target(ours, x, e, last), -x)


def test_the_velocity_gives_back_picture_and_noise() -> None:
    x, e = pair(len(ENDS))
    ours, t = schedule("v_prediction"), torch.tensor(ENDS)
    a = ours.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    noisy, v = diffusion.add_noise(ours, x, e, t), diffusion.target(ours, x, e, t)
    torch.testing.assert_close(a.sqrt() * noisy - (1 - a).sqrt() * v, x, atol=1e-5, rtol=0)
    torch.testing.assert_close((1 - a).sqrt() * noisy + a.sqrt() * v, e, atol=1e-5, rtol=0)


def test_a_batch_of_mixed_timesteps_equals_its_rows_one_by_one() -> None:
    x, e = pair(len(ENDS))
    ours, t = schedule("v_prediction"), torch.tensor(ENDS)
    for function in (diffusion.add_noise, diffusion.target):
        rows = [function(ours, x[i : i + 1], e[i : i + 1], t[i : i + 1]) for i in range(len(ENDS))]
        assert torch.equal(function(ours, x, e, t), torch.cat(rows))


def test_snr_equals_the_definition() -> None:
    a = signal_share()[ENDS]
    got = diffusion.snr(schedule(), torch.tensor(ENDS)).double().numpy()
    np.testing.assert_allclose(got, a / (1 - a), rtol=2e-4)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_equal_the_definition(prediction_type: str, gamma: float) -> None:
    a = signal_share()[ENDS]
    snr = a / (1 - a)
    capped = np.minimum(snr, gamma)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": np.ones_like(snr)}
    got = diffusion.loss_weights(schedule(prediction_type), torch.tensor(ENDS), gamma)
    np.testing.assert_allclose(got.double(), capped / divisor[prediction_type], rtol=2e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_error_of_the_clean_latent_alike(prediction_type: str) -> None:
    """A clean latent that is off by d costs min(SNR, gamma) d^2 whatever is predicted."""
    x, e = pair(len(ENDS))
    t, ours = torch.tensor(ENDS), schedule(prediction_type)
    a = ours.alphas_cumprod[t].double().reshape(-1, 1, 1, 1)
    wrong = x.double() + 0.5
    noisy = a.sqrt() * x.double() + (1 - a).sqrt() * e.double()
    wrong_e = (noisy - a.sqrt() * wrong) / (1 - a).sqrt()
    guess = {
        "epsilon": wrong_e,
        "sample": wrong,
        "v_prediction": a.sqrt() * wrong_e - (1 - a).sqrt() * wrong,
    }[prediction_type]
    wanted = diffusion.target(ours, x.double(), e.double(), t)
    cost = diffusion.loss_weights(ours, t, 5.0) * diffusion.sample_losses(guess, wanted)
    snr = (a / (1 - a)).flatten()
    torch.testing.assert_close(cost.double(), snr.clamp(max=5) * 0.25, rtol=1e-3, atol=1e-6)


def test_weights_are_finite_at_both_ends_of_any_schedule() -> None:
    a = torch.tensor([1.0, 0.5, 0.0])
    for kind in ("v_prediction", "sample"):
        weights = diffusion.loss_weights(NoiseSchedule(a, kind), torch.arange(3), 5.0)
        assert weights.isfinite().all()
    weights = diffusion.loss_weights(NoiseSchedule(a[:2], "epsilon"), torch.arange(2), 5.0)
    assert weights.tolist() == [0.0, 1.0]


def test_without_gamma_every_timestep_weighs_the_same() -> None:
    assert diffusion.loss_weights(schedule(), torch.tensor(ENDS)).tolist() == [1.0] * len(ENDS)


def test_epsilon_with_a_terminal_snr_of_zero_is_refused() -> None:
    with pytest.raises(AssertionError, match="cannot be trained"):
        schedule("epsilon", zero=True)


def test_timesteps_reach_both_ends_and_are_uniform() -> None:
    ours = NoiseSchedule(torch.linspace(0.9, 0.1, 10), "epsilon")
    drawn = diffusion.sample_timesteps(ours, 20_000, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=10)
    assert drawn.dtype == torch.int64
    assert len(counts) == 10
    # Chi-square with 9 degrees of freedom exceeds 27.9 once in a thousand.
    assert ((counts - 2000.0) ** 2 / 2000).sum() < 27.9


def test_noise_offset_lifts_whole_channels_and_nothing_else() -> None:
    plain = diffusion.sample_noise((4, 64, 64), torch.Generator().manual_seed(0))
    lifted = diffusion.sample_noise((4, 64, 64), torch.Generator().manual_seed(0), 0.1)
    lift = lifted - plain
    torch.testing.assert_close(lift, lift[:, :1, :1].expand_as(lift), atol=1e-6, rtol=0)
    lifts = [
        diffusion.sample_noise((4, 1, 1), torch.Generator().manual_seed(i), 0.1)
        - diffusion.sample_noise((4, 1, 1), torch.Generator().manual_seed(i))
        for i in range(2000)
    ]
    assert torch.stack(lifts).std().item() == pytest.approx(0.1, rel=0.05)


def test_losses_are_one_mean_a_sample_in_fp32() -> None:
    x, e = pair(3)
    got = diffusion.sample_losses(x.bfloat16(), e)
    wanted = ((x.bfloat16().double() - e.double()) ** 2).mean(dim=(1, 2, 3))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=0)


@settings(deadline=None, max_examples=50)
@given(t=st.integers(0, 999), gamma=st.floats(0.01, 100))
def test_min_snr_never_raises_a_weight_above_the_plain_one(t: int, gamma: float) -> None:
    for kind in ("epsilon", "v_prediction"):
        weight = diffusion.loss_weights(schedule(kind), torch.tensor([t]), gamma).item()
        assert 0 <= weight <= 1
