"""The distributions of timesteps, against diffusers' draws and scipy's densities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from scipy import stats

from tunekit import seeding, timesteps
from tunekit.timesteps import probabilities


def counted(places: np.ndarray, count: int) -> np.ndarray:
    drawn = np.bincount(np.minimum((places * count).astype(int), count - 1), minlength=count)
    return drawn / len(places)


@pytest.mark.parametrize(
    ("sampling", "parameters", "theirs"),
    [
        ("logit_normal", (0.0, 1.0), {"logit_mean": 0.0, "logit_std": 1.0}),
        ("logit_normal", (-0.6, 1.5), {"logit_mean": -0.6, "logit_std": 1.5}),
        ("mode", (1.29, 0.0), {"mode_scale": 1.29}),
        ("mode", (-0.5, 0.0), {"mode_scale": -0.5}),
    ],
)
def test_tables_equal_the_draws_of_diffusers(
    sampling: str, parameters: tuple[float, float], theirs: dict[str, float]
) -> None:
    scheme = {"logit_normal": "logit_normal", "mode": "mode"}[sampling]
    places = compute_density_for_timestep_sampling(
        scheme, 200_000, generator=torch.Generator().manual_seed(0), **theirs
    )
    table = probabilities(20, sampling, parameters)
    np.testing.assert_allclose(table, counted(places.double().numpy(), 20), atol=0.004)


def test_beta_equals_its_density() -> None:
    table = probabilities(1000, "beta", (2.0, 5.0))
    middles = (np.arange(1000) + 0.5) / 1000
    np.testing.assert_allclose(table * 1000, stats.beta(2, 5).pdf(middles), atol=1e-3)


def test_uniform_is_uniform() -> None:
    np.testing.assert_allclose(probabilities(10), 0.1)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_a_shift_moves_every_place(shift: float) -> None:
    x = np.random.default_rng(0).uniform(size=200_000)
    moved = shift * x / (1 + (shift - 1) * x)
    table = probabilities(20, shift=shift)
    np.testing.assert_allclose(table, counted(moved, 20), atol=0.004)


def test_limits_leave_the_rest_in_proportion() -> None:
    whole = probabilities(100, "logit_normal")
    part = probabilities(100, "logit_normal", limits=(20, 49))
    assert part[:20].sum() == part[50:].sum() == 0
    np.testing.assert_allclose(part[20:50], whole[20:50] / whole[20:50].sum())


def test_a_bias_multiplies_its_end() -> None:
    early = probabilities(100, bias=("early", 3.0, 0.25))
    assert early[0] == pytest.approx(3 * early[99])
    assert early[24] == pytest.approx(3 * early[25])
    late = probabilities(100, bias=("late", 3.0, 0.25))
    np.testing.assert_allclose(late, early[::-1])


def test_a_bias_keeps_within_the_limits() -> None:
    table = probabilities(100, bias=("late", 2.0, 0.5), limits=(10, 29))
    np.testing.assert_allclose(table[20:30], 2 * table[10:20])
    assert table[:10].sum() + table[30:].sum() == 0


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "mode", "beta"])
def test_draws_follow_the_table(sampling: str) -> None:
    table = probabilities(10, sampling, (0.8, 1.4))
    drawn = timesteps.draw([table] * 20_000, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.int64
    counts = torch.bincount(drawn, minlength=10).numpy()
    # Chi-square with 9 degrees of freedom exceeds 27.9 once in a thousand.
    assert ((counts - 20_000 * table) ** 2 / (20_000 * table)).sum() < 27.9


def test_each_picture_has_its_own_table_and_its_own_number() -> None:
    low, high = probabilities(10, limits=(0, 2)), probabilities(10, limits=(7, 9))
    generator = seeding.generator(5, "timesteps", 3)
    drawn = timesteps.draw([low, high, low, high], generator)
    assert (drawn[::2] < 3).all()
    assert (drawn[1::2] > 6).all()
    again = timesteps.draw([low, high], seeding.generator(5, "timesteps", 3))
    assert torch.equal(again, drawn[:2])


def test_one_timestep_alone_can_be_trained() -> None:
    table = probabilities(1000, limits=(999, 999))
    assert (timesteps.draw([table] * 50, torch.Generator()) == 999).all()


def test_a_picture_of_four_times_the_area_shifts_by_2() -> None:
    assert timesteps.resolution_shift(4 * 64 * 64, 64 * 64) == 2
