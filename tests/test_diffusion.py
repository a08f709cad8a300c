"""The mathematics against independent computations: numpy in float64, and diffusers' schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from tunekit import diffusion
from tunekit.diffusion import FlowSchedule, NoiseSchedule

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


class TestFlow:
    flow = FlowSchedule(torch.arange(1, 1001) / 1000)

    def test_noising_equals_that_of_diffusers(self) -> None:
        x, e = pair(len(ENDS))
        theirs = FlowMatchEulerDiscreteScheduler()  # its timesteps are 1..1000, falling
        wanted = theirs.scale_noise(x, theirs.timesteps.flip(0)[ENDS], e)
        got = diffusion.add_noise(self.flow, x, e, torch.tensor(ENDS))
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)

    def test_the_target_is_the_slope_of_the_way_from_picture_to_noise(self) -> None:
        x, e = pair(3)
        t = torch.tensor([10, 500, 900])
        slope = 1000 * (
            diffusion.add_noise(self.flow, x.double(), e.double(), t + 1)
            - diffusion.add_noise(self.flow, x.double(), e.double(), t)
        )
        got = diffusion.target(self.flow, x, e, t)
        torch.testing.assert_close(got.double(), slope, atol=2e-4, rtol=0)

    def test_snr(self) -> None:
        got = diffusion.snr(self.flow, torch.tensor([0, 499, 999]))
        assert got.tolist() == pytest.approx([999.0**2, 1.0, 0.0], rel=1e-4)

    def test_weights_made_for_diffusion_are_refused(self) -> None:
        with pytest.raises(AssertionError, match="not flow"):
            diffusion.loss_weights(self.flow, torch.tensor([5]), 5.0)


WEIGHTINGS: dict[str, tuple[dict[str, float], Callable[[np.ndarray], np.ndarray]]] = {
    "soft_min": ({"soft_min_snr_gamma": 5.0}, lambda snr: 1 / (1 / snr + 1 / 5.0)),
    "p2": ({"p2_gamma": 0.5}, lambda snr: snr / np.sqrt(1 + snr)),
    "debiased": ({"debiased": True}, np.sqrt),
}


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_weights_equal_the_definition(prediction_type: str, name: str) -> None:
    settings, on_clean = WEIGHTINGS[name]
    a = signal_share()[ENDS]
    snr = a / (1 - a)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
    got = diffusion.loss_weights(schedule(prediction_type), torch.tensor(ENDS), **settings)
    np.testing.assert_allclose(got.double(), on_clean(snr) / divisor, rtol=3e-4)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_weight_is_finite_at_both_ends(name: str) -> None:
    a = torch.tensor([1.0, 0.5, 0.0])
    velocity = NoiseSchedule(a, "v_prediction")
    weights = diffusion.loss_weights(velocity, torch.arange(3), **WEIGHTINGS[name][0])
    assert weights[::2].tolist() == [0.0, 0.0]


def test_the_soft_weight_is_the_hard_one_without_its_corner() -> None:
    t = torch.arange(1000)
    hard = diffusion.loss_weights(schedule(), t, 5.0)
    soft = diffusion.loss_weights(schedule(), t, soft_min_snr_gamma=5.0)
    assert (soft <= hard).all()
    assert (soft >= hard / 2).all()


class TestZeroTerminalSnr:
    def test_it_equals_that_of_diffusers(self) -> None:
        ours = diffusion.zero_terminal_snr(schedule("v_prediction"))
        theirs = scheduler("v_prediction", zero=True).alphas_cumprod
        torch.testing.assert_close(ours.alphas_cumprod, theirs, atol=2e-6, rtol=0)
        assert ours.alphas_cumprod[-1] == 0

    def test_the_first_timestep_stays(self) -> None:
        before = schedule("v_prediction")
        after = diffusion.zero_terminal_snr(before)
        torch.testing.assert_close(after.alphas_cumprod[0], before.alphas_cumprod[0])

    def test_a_schedule_that_ends_in_pure_noise_is_returned_as_it_is(self) -> None:
        already = schedule("v_prediction", zero=True)
        assert diffusion.zero_terminal_snr(already) is already


class TestPyramidNoise:
    def draw(self, seed: int, discount: float = 0.8, size: int = 32) -> torch.Tensor:
        return diffusion.sample_noise(
            (4, size, size), torch.Generator().manual_seed(seed), pyramid_discount=discount
        )

    def test_the_same_seed_is_the_same_noise_of_deviation_1(self) -> None:
        assert torch.equal(self.draw(3), self.draw(3))
        assert self.draw(3).std().item() == pytest.approx(1, abs=1e-5)

    def test_coarse_structure_is_added(self) -> None:
        """Means over 8 x 8 cells of plain noise deviate by 1/8; the pyramid's by far more."""
        blocks = torch.nn.functional.avg_pool2d
        plain = torch.cat([blocks(self.draw(i, 0.0)[None], 8) for i in range(20)])
        coarse = torch.cat([blocks(self.draw(i)[None], 8) for i in range(20)])
        assert plain.std().item() == pytest.approx(1 / 8, rel=0.1)
        assert coarse.std() > 4 * plain.std()

    def test_a_small_discount_leaves_nearly_plain_noise(self) -> None:
        plain, little = self.draw(1, 0.0), self.draw(1, 0.01)
        assert (plain - little).abs().max() < 0.1

    def test_a_latent_of_one_cell_has_no_coarser_level(self) -> None:
        assert torch.equal(self.draw(1, 0.8, 1), self.draw(1, 0.0, 1))

    def test_shapes_that_are_no_squares(self) -> None:
        noise = diffusion.sample_noise((4, 6, 40), torch.Generator(), pyramid_discount=0.9)
        assert noise.shape == (4, 6, 40)


def test_perturbed_noise_has_the_deviation_of_both() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = diffusion.sample_noise((4, 64, 64), generator)
    perturbed = diffusion.perturb_noise(noise, generator, 0.5)
    assert (perturbed - noise).std().item() == pytest.approx(0.5, rel=0.03)
    assert perturbed.std().item() == pytest.approx(math.sqrt(1.25), rel=0.03)


class TestHuber:
    @pytest.mark.parametrize("loss", ["huber", "smooth_l1"])
    def test_it_equals_the_definition(self, loss: Any) -> None:
        x, e = pair(3)
        c = torch.tensor([0.01, 0.5, 10.0])
        c64 = c.double().numpy()[:, None, None, None]
        d = x.double().numpy() - e.double().numpy()
        wanted = 2 * (np.sqrt(d**2 + c64**2) - c64) * (c64 if loss == "huber" else 1)
        got = diffusion.sample_losses(x, e, loss=loss, scale=c)
        np.testing.assert_allclose(got.double(), wanted.mean(axis=(1, 2, 3)), rtol=1e-5)

    def test_a_large_scale_is_the_square_and_a_small_one_the_distance(self) -> None:
        x, e = pair(2)
        large, small = torch.full((2,), 1e3), torch.full((2,), 1e-4)
        torch.testing.assert_close(
            diffusion.sample_losses(x, e, loss="huber", scale=large),
            diffusion.sample_losses(x, e),
            rtol=1e-4,
            atol=0,
        )
        torch.testing.assert_close(
            diffusion.sample_losses(x, e, loss="smooth_l1", scale=small),
            2 * (x - e).abs().flatten(1).mean(dim=1),
            rtol=1e-3,
            atol=0,
        )

    def test_the_gradient_at_a_perfect_prediction_is_0(self) -> None:
        x = torch.zeros(1, 4, 2, 2, requires_grad=True)
        loss = diffusion.sample_losses(x, x.detach(), loss="huber", scale=torch.tensor([1e-3]))
        loss.sum().backward()
        assert x.grad is not None
        assert (x.grad == 0).all()

    def test_a_mask_weighs_any_loss(self) -> None:
        x, e = pair(2)
        mask = torch.zeros(2, 1, 3, 5)
        mask[:, :, 1, 2] = 0.5
        c = torch.tensor([0.1, 0.2])
        got = diffusion.sample_losses(x, e, mask, loss="huber", scale=c)
        spot = diffusion.sample_losses(x[:, :, 1, 2], e[:, :, 1, 2], loss="huber", scale=c)
        torch.testing.assert_close(got, spot)

    def test_scales_over_the_timesteps(self) -> None:
        ours, t = schedule(), torch.tensor(ENDS)
        a = signal_share()[ENDS]
        assert diffusion.huber_scale(ours, t, 0.1).tolist() == pytest.approx([0.1] * len(ENDS))
        exponential = diffusion.huber_scale(ours, t, 0.1, "exponential")
        np.testing.assert_allclose(
            exponential, np.exp(np.log(0.1) / 1000 * np.array(ENDS)), rtol=1e-5
        )
        by_snr = diffusion.huber_scale(ours, t, 0.1, "snr")
        ratio = np.sqrt((1 - a) / a)
        np.testing.assert_allclose(by_snr, 0.9 / (1 + ratio) ** 2 + 0.1, rtol=1e-4)

    def test_the_scale_of_pure_noise_is_c(self) -> None:
        ours = schedule("v_prediction", zero=True)
        assert diffusion.huber_scale(ours, torch.tensor([999]), 0.1, "snr").item() == (
            pytest.approx(0.1)
        )


@given(data=st.data())
@settings(deadline=None)
def test_a_masked_loss_is_the_weighted_mean(data: st.DataObject) -> None:
    prediction, wanted = pair(2)
    seed = data.draw(st.integers(0, 99))
    weights = np.random.default_rng(seed).random((2, 1, 3, 5)).astype(np.float32)
    found = diffusion.sample_losses(prediction, wanted, torch.from_numpy(weights))
    squares = (prediction.double() - wanted.double()).square().numpy()
    everywhere = np.broadcast_to(weights, squares.shape).reshape(2, -1)
    rows = zip(squares.reshape(2, -1), everywhere, strict=True)
    means = [np.average(row, weights=share) for row, share in rows]
    np.testing.assert_allclose(found, means, rtol=1e-5)


def test_a_mask_of_ones_changes_nothing_and_zeros_are_not_looked_at() -> None:
    prediction, wanted = pair(2)
    plain = diffusion.sample_losses(prediction, wanted)
    torch.testing.assert_close(
        diffusion.sample_losses(prediction, wanted, torch.ones(2, 1, 3, 5)), plain
    )
    mask = torch.zeros(2, 1, 3, 5)
    mask[..., :2] = 0.3  # half as bright a mask is the same mask: its weights are relative
    inside = diffusion.sample_losses(prediction[..., :2], wanted[..., :2])
    torch.testing.assert_close(diffusion.sample_losses(prediction, wanted, mask), inside)
